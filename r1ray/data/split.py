"""Training and held-out dialogues out of one set, by the hash of their ids: the same split in any row order. Knows no file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from r1ray.types import Conversation

__all__ = ["hold_out", "intent_of"]


def hold_out(
    conversations: Sequence[Conversation], share: float, *, seed: int = 0, by_intent: bool = False
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """(training, held-out), each in the given order.

    Without `by_intent` every dialogue is drawn on its own, so adding rows moves no other row. With it each intent gives
    `share` of its dialogues, at least one where it has two. Equal rows (`id#2`) stay on one side.
    """
    held = _stratified(conversations, share, seed) if by_intent else {_stem(c.id) for c in conversations if _draw(seed, c.id) < share}
    return tuple(c for c in conversations if _stem(c.id) not in held), tuple(c for c in conversations if _stem(c.id) in held)


def intent_of(conversation: Conversation) -> str | None:
    """The intent of the last annotated assistant turn."""
    found = (m.annotations.intent for m in reversed(conversation.messages) if m.role == "assistant" and m.annotations)
    return next((intent for intent in found if intent), None)


def _stratified(conversations: Sequence[Conversation], share: float, seed: int) -> set[str]:
    groups: defaultdict[str | None, set[str]] = defaultdict(set)
    for conversation in conversations:
        groups[intent_of(conversation)].add(_stem(conversation.id))
    held: set[str] = set()
    for names in groups.values():
        num_held = round(share * len(names))
        if share > 0 and len(names) > 1:
            num_held = min(max(num_held, 1), len(names) - 1)
        held.update(sorted(names, key=lambda name: (_draw(seed, name), name))[:num_held])
    return held


def _stem(name: str) -> str:
    return name.partition("#")[0]


def _draw(seed: int, name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.sha256(f"hold out:{seed}:{_stem(name)}".encode()).digest()  # not the hash that `data.limit` samples by
    return int.from_bytes(digest[:7], "big") / 2**56
