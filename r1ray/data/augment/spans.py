"""Which part of a question an operation may change: never the retrieved passages, never an annotated value, never a mask or a number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from r1ray.types import Conversation, EntityValue, Message

__all__ = ["Span", "bounded", "edited", "entities_of", "intents_of", "is_free", "protected", "question_start"]

# The compact layout ends with the passages, R1's official one with a heading before the question (model.prompts).
_BEFORE_QUESTION = re.compile(r"\[webpage \d+ end\]|^# (?:The user's message:|用户消息：)$", re.M)
_FIXED = re.compile(r"\[[A-Z_]+_\d+\]|\[citation:\d+\]|\d[\d,.]*|https?://\S+|`[^`]*`")

Span = tuple[int, int]


def entities_of(conversation: Conversation) -> dict[str, EntityValue]:
    """Every annotated entity; the last value where a name has several."""
    return {name: value for m in conversation.messages if m.annotations for name, value in m.annotations.entities.items()}


def intents_of(conversation: Conversation) -> dict[str, str | None]:
    """Entity -> the intent that it was annotated with, the last one as in `entities_of`."""
    return {name: m.annotations.intent for m in conversation.messages if m.annotations for name in m.annotations.entities}


def question_start(text: str) -> int:
    """Where the customer's own words begin, after the passages."""
    ends = [found.end() for found in _BEFORE_QUESTION.finditer(text)]
    return ends[-1] if ends else 0


def bounded(value: EntityValue) -> re.Pattern[str]:
    """The value as written in a text, not as part of a longer word or number."""
    text = str(value)
    before = r"(?<![0-9A-Za-z])" if text[:1].isascii() and text[:1].isalnum() else ""
    after = r"(?![0-9A-Za-z])" if text[-1:].isascii() and text[-1:].isalnum() else ""
    return re.compile(before + re.escape(text) + after)


def protected(text: str, entities: Mapping[str, EntityValue]) -> list[Span]:
    """Stretches that must stay as they are."""
    start = question_start(text)
    spans: list[Span] = [(0, start)] if start else []
    spans += [found.span() for found in _FIXED.finditer(text)]
    for value in entities.values():
        if str(value).strip() and not isinstance(value, bool):
            spans += [found.span() for found in bounded(value).finditer(text)]
    return spans


def is_free(start: int, end: int, spans: Sequence[Span]) -> bool:
    return all(end <= left or start >= right for left, right in spans)


def edited(conversation: Conversation, edit: Callable[[str, list[Span]], str]) -> list[Message]:
    """The turns with `edit(text, protected spans)` in place of each user turn."""
    entities = entities_of(conversation)
    return [replace(m, content=edit(m.content, protected(m.content, entities))) if m.role == "user" else m for m in conversation.messages]
