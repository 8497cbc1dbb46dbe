"""Training and held-out dialogues out of one set, by the hash of where they come from: the same split in any row order. Knows no file."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from r1ray.types import Conversation

__all__ = ["hold_out", "intent_of", "origins_digest", "stem", "stem_hash"]

_MADE = re.compile(r"#[a-z_]+(\.[a-z_]+)?(#\d+)?$")  # `#masked`, `#traps.conflict`, `#synonyms#2`
_NUMBERED = re.compile(r"((?:^|.*[-/])[0-9a-f]{16}|tree-.+)#\d+$")  # equal rows whose id is of their content; rows of one path of a tree


def hold_out(
    conversations: Sequence[Conversation], share: float, *, seed: int = 0, by_intent: bool = False
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """(training, held-out), each in the given order.

    Without `by_intent` every dialogue is drawn on its own, so adding rows moves no other row. With it each intent gives
    `share` of its dialogues, at least one where it has two. Rows of one `stem` stay on one side.
    """
    held = _stratified(conversations, share, seed) if by_intent else {stem(c.id) for c in conversations if _draw(seed, c.id) < share}
    return tuple(c for c in conversations if stem(c.id) not in held), tuple(c for c in conversations if stem(c.id) in held)


def stem(name: str) -> str:
    """The id less what r1ray itself puts behind one: an augmented row has its origin's, equal rows without ids of their own share one.

    `x#masked`, `x#synonyms#2` -> `x`; `0123456789abcdef#2` -> `0123456789abcdef`; a user's `ticket#12` stays what it is.
    """
    while (shorter := _NUMBERED.sub(r"\1", _MADE.sub("", name))) != name:
        name = shorter
    return name


def stem_hash(name: str) -> int:
    """64 bits of the stem: what is stored of a row's origin where a million of them are."""
    return int.from_bytes(hashlib.blake2b(stem(name).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def origins_digest(hashes: Iterable[int]) -> str:
    """sha256 over the rows' `stem_hash` in order: equal where the same rows would be held out."""
    digest = hashlib.sha256()
    for number in hashes:
        digest.update(number.to_bytes(8, "little"))
    return digest.hexdigest()


def intent_of(conversation: Conversation) -> str | None:
    """The intent of the last annotated assistant turn."""
    found = (m.annotations.intent for m in reversed(conversation.messages) if m.role == "assistant" and m.annotations)
    return next((intent for intent in found if intent), None)


def _stratified(conversations: Sequence[Conversation], share: float, seed: int) -> set[str]:
    groups: defaultdict[str | None, set[str]] = defaultdict(set)
    for conversation in conversations:
        groups[intent_of(conversation)].add(stem(conversation.id))
    held: set[str] = set()
    for names in groups.values():
        num_held = round(share * len(names))
        if share > 0 and len(names) > 1:
            num_held = min(max(num_held, 1), len(names) - 1)
        held.update(sorted(names, key=lambda name: (_draw(seed, name), name))[:num_held])
    return held


def _draw(seed: int, name: str) -> float:
    """Uniform in [0, 1)."""
    drawn = f"hold out:{seed}:{stem(name)}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(drawn).digest()  # not the hash that `data.limit` samples by
    return int.from_bytes(digest[:7], "big") / 2**56
