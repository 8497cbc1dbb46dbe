"""Whose turn it is: the order of roles that a dialogue must have, and the repair of one that has not. Knows no format.

    [system] user assistant (user | tool ... assistant) ... assistant

A greeting by the assistant, a customer who sends twice and a question nobody answered are common in exports. No chat template
agrees on them, so `strict` refuses the row and says why; `repair` drops the greeting, joins repeated turns by a line break and
drops the unanswered end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from r1ray.data.records import BadRow
from r1ray.types import Message, Role

__all__ = ["check_order", "repair"]

_FOLLOWS: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_order(messages: Sequence[Message]) -> None:
    """Raises BadRow naming the first turn out of order."""
    previous: Role | None = None
    for position, message in enumerate(messages, start=1):
        if message.role not in _FOLLOWS[previous]:
            before = f"after {previous}" if previous else "at the start"
            raise BadRow(f"turn {position} is {message.role} {before}; expected {' or '.join(_FOLLOWS[previous])}")
        previous = message.role
    if previous is None:
        raise BadRow("no turns")
    if previous != "assistant":
        raise BadRow(f"the last turn is {previous}; a dialogue must end with an assistant turn")


def repair(messages: Sequence[Message]) -> list[Message]:
    """The same dialogue in order where dropping and joining suffices; `check_order` decides whether it did."""
    kept: list[Message] = []
    for message in messages:
        if message.role == "assistant" and (not kept or kept[-1].role == "system"):
            continue
        if kept and kept[-1].role == message.role and message.role != "tool":
            kept[-1] = _joined(kept[-1], message)
        else:
            kept.append(message)
    while kept and kept[-1].role != "assistant":
        kept.pop()
    return kept


def _joined(first: Message, second: Message) -> Message:
    reasoning = "\n".join(r for r in (first.reasoning, second.reasoning) if r) or None
    return replace(
        first,
        content=f"{first.content}\n{second.content}",
        reasoning=reasoning,
        annotations=second.annotations or first.annotations,
    )
