"""An answer's text taken apart and normalised, so that equal answers compare as equal in Chinese and English.

The structured form (the demo's): a first line `{"intent": ..., "entities": {...}}`, then the reply.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "normal_text", "normal_value", "parse_answer"]

_BETWEEN_CHINESE = re.compile(r"(?<=[\u3400-\u9fff])\s+|\s+(?=[\u3400-\u9fff])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`is_structured`: the first line is a JSON object with a text `intent` and an object `entities`."""

    text: str
    is_structured: bool = False
    intent: str | None = None
    entities: Mapping[str, Any] = field(default_factory=dict)
    reply: str = ""


def parse_answer(text: str) -> Answer:
    """Never fails: an answer that is not of the structured form is all reply."""
    first, _, rest = text.strip().partition("\n")
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        return Answer(text=text, reply=text.strip())
    if not isinstance(head, dict) or not isinstance(head.get("intent"), str) or not isinstance(head.get("entities"), dict):
        return Answer(text=text, reply=text.strip())
    return Answer(text=text, is_structured=True, intent=head["intent"], entities=head["entities"], reply=rest.strip())


def normal_text(text: str) -> str:
    """Words to compare: NFKC (full-width forms), case folded, punctuation and underscores to spaces, no spaces between Chinese."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded)
    return _BETWEEN_CHINESE.sub("", " ".join(spaced.split()))


def normal_value(value: Any) -> str:
    """An entity's value: 500, 500.0 and "500" are equal; texts compare by their words."""
    if isinstance(value, bool):
        return str(value).casefold()
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError, OverflowError):
        return normal_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))
