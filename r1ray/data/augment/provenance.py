"""How a made row came to be, in enough detail to undo it. Knows no operation.

A change is (turn, field, position, old text, new text); fields are content, reasoning and entities (as their JSON text), and turn for
a turn that was added.
Changes apply in order and are undone in reverse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

from r1ray.types import Annotations, Conversation, Message

__all__ = ["Change", "Made", "Operation", "dump", "load", "recorded", "undo"]

Field = Literal["content", "reasoning", "entities", "turn"]


@dataclass(frozen=True, slots=True)
class Change:
    """`old` at `position` of a turn's field became `new`."""

    turn: int
    field: Field
    position: int
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One named, seeded step. `detail` is what a template was filled with; such a row has no original to go back to."""

    name: str
    seed: int
    changes: tuple[Change, ...] = ()
    detail: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A new row, the row that it comes from, and how."""

    conversation: Conversation
    origin: str
    operations: tuple[Operation, ...]


def recorded(before: Conversation, after: Sequence[Message], *, name: str, seed: int) -> Made | None:
    """The changed turns as a row of its own; None when nothing changed.

    The id is `<origin's id>#<operation>`: `hold_out` keeps it on its origin's side, so that no held-out row leaks into training.
    """
    changes = [change for turn, pair in enumerate(zip(before.messages, after, strict=False)) for change in _changes(turn, *pair)]
    changes += [Change(turn, "turn", 0, "", after[turn].content) for turn in range(len(before.messages), len(after))]
    if not changes:
        return None
    operation = Operation(name=name, seed=seed, changes=tuple(changes))
    made = replace(before, id=f"{before.id}#{name}", messages=tuple(after))
    return Made(conversation=made, origin=before.id, operations=(operation,))


def undo(conversation: Conversation, origin: str, operations: Sequence[Operation]) -> Conversation:
    """The row that `conversation` was made from, equal in every turn.

    Raises:
        ValueError: the row was altered since, or comes from a template.
    """
    messages = list(conversation.messages)
    for operation in reversed(operations):
        if operation.detail is not None:
            raise ValueError(f"{conversation.id} was made from the template {operation.name}; there is no row to go back to")
        for change in reversed(operation.changes):
            if change.field == "turn":
                del messages[change.turn]
                continue
            messages[change.turn] = _undone(messages[change.turn], change, conversation.id)
    return replace(conversation, id=origin, messages=tuple(messages))


def dump(operations: Sequence[Operation]) -> str:
    """The text of the column `operations`."""
    return json.dumps([_plain(o) for o in operations], ensure_ascii=False)


def load(text: str) -> tuple[Operation, ...]:
    """Inverse of `dump`."""
    return tuple(
        Operation(name=o["name"], seed=o["seed"], changes=tuple(Change(*c) for c in o.get("changes", ())), detail=o.get("detail"))
        for o in json.loads(text)
    )


def _plain(operation: Operation) -> dict[str, object]:
    tree: dict[str, object] = {"name": operation.name, "seed": operation.seed}
    if operation.changes:
        tree["changes"] = [astuple(change) for change in operation.changes]
    return tree if operation.detail is None else {**tree, "detail": dict(operation.detail)}


def _changes(turn: int, before: Message, after: Message) -> list[Change]:
    fields: tuple[Field, ...] = ("content", "reasoning", "entities")
    return [change for field in fields if (change := _change(turn, field, _text(before, field), _text(after, field)))]


def _change(turn: int, field: Field, old: str, new: str) -> Change | None:
    """The one stretch that differs."""
    if old == new:
        return None
    shorter = min(len(old), len(new))
    start = next((place for place in range(shorter) if old[place] != new[place]), shorter)
    tail = next((place for place in range(shorter - start) if old[-1 - place] != new[-1 - place]), shorter - start)
    return Change(turn, field, start, old[start : len(old) - tail], new[start : len(new) - tail])


def _undone(message: Message, change: Change, name: str) -> Message:
    text = _text(message, change.field)
    end = change.position + len(change.new)
    if text[change.position : end] != change.new:
        raise ValueError(f"{name}: turn {change.turn + 1} was altered since {change.new!r} was put there")
    text = text[: change.position] + change.old + text[end:]
    if change.field == "content":
        return replace(message, content=text)
    if change.field == "reasoning":
        return replace(message, reasoning=text or None)
    intent = message.annotations.intent if message.annotations else None
    return replace(message, annotations=Annotations(intent=intent, entities=json.loads(text)))


def _text(message: Message, field: Field) -> str:
    if field == "content":
        return message.content
    if field == "reasoning":
        return message.reasoning or ""
    return json.dumps(dict(message.annotations.entities), ensure_ascii=False) if message.annotations else ""
