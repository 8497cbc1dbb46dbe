"""Rewards by rule: pure functions of the answers. Each class takes its settings and says its formula in their docstring."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from r1ray.data.clean.pii import Masker
from r1ray.data.prepare.config import PiiConfig
from r1ray.evaluate.answer import normal_text
from r1ray.evaluate.exact import citation, exact_match
from r1ray.evaluate.example import PASSAGE
from r1ray.evaluate.lexical import rouge_l
from r1ray.model.reasoning import CLOSE, OPEN
from r1ray.train.rewards.base import Answer
from r1ray.train.rewards.config import (
    ExplanationReward,
    ForbiddenReward,
    LengthReward,
    NoveltyReward,
    RegexReward,
)
from r1ray.types import Conversation, Message

__all__ = ["Exact", "Explanation", "Forbidden", "Format", "Length", "Novelty", "Overlap", "Regex"]

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # a Chinese character, or a run of letters and digits


class Exact:
    """The reference's words in its order."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [exact_match(answer.content, answer.reference).numerator for answer in answers]


class Overlap:
    """ROUGE-L against the reference."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [rouge_l(answer.content, answer.reference).numerator for answer in answers]


class Format:
    """Reasoning between tags, then an answer, then the end."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._is_right(answer)) for answer in answers]

    def _is_right(self, answer: Answer) -> bool:
        begins, closed = answer.text.lstrip().startswith(OPEN), answer.text.count(CLOSE) == 1
        once = begins and closed and answer.text.count(OPEN) == 1
        return once and answer.is_finished and bool(answer.reasoning) and bool(answer.content.strip())


@dataclass(frozen=True, slots=True)
class Length:
    """A window with slopes on both sides."""

    settings: LengthReward

    def score(self, answers: Sequence[Answer]) -> list[float]:
        low, high = self.settings.low, self.settings.high
        lengths = [answer.num_tokens if self.settings.unit == "tokens" else len(answer.content.strip()) for answer in answers]
        return [num / low if num < low else max(0.0, 1 - max(0, num - high) / high) for num in lengths]


@dataclass(slots=True)
class Forbidden:
    """Nothing forbidden and nobody's data."""

    settings: ForbiddenReward
    _words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._words = tuple(filter(None, map(normal_text, self.settings.words)))

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [float(not self._has_words(answer.text) and not self._has_data(answer.text)) for answer in answers]

    def _has_words(self, text: str) -> bool:
        said = normal_text(text)
        return any(re.search(rf"(?<![0-9a-z]){re.escape(word)}(?![0-9a-z])", said) for word in self._words)

    def _has_data(self, text: str) -> bool:
        dialogue = Conversation(id="", messages=(Message(role="assistant", content=text),))
        return Masker(PiiConfig(kinds=self.settings.personal_data)).mask(dialogue) is not dialogue


@dataclass(frozen=True, slots=True)
class Novelty:
    """Against the other answers of the group."""

    settings: NoveltyReward

    def score(self, answers: Sequence[Answer]) -> list[float]:
        grams = [self._grams(answer.content) for answer in answers]
        holders: dict[int, Counter[tuple[str, ...]]] = {}
        for answer, mine in zip(answers, grams, strict=True):
            holders.setdefault(answer.group, Counter()).update(set(mine))
        return [
            sum(holders[answer.group][gram] == 1 for gram in set(mine)) / len(mine) if mine else 0.0
            for answer, mine in zip(answers, grams, strict=True)
        ]

    def _grams(self, text: str) -> list[tuple[str, ...]]:
        words = _WORD.findall(text.casefold())
        size = min(self.settings.ngram, len(words))
        return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)] if words else []


@dataclass(slots=True)
class Explanation:
    """Reasons and sources."""

    settings: ExplanationReward
    _markers: tuple[re.Pattern[str], ...] = field(init=False)

    def __post_init__(self) -> None:
        self._markers = tuple(_marker(normal_text(marker)) for marker in self.settings.markers)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> float:
        parts: list[float] = []
        if self.settings.wanted and self._markers:
            said = normal_text(answer.text)
            num = sum(len(marker.findall(said)) for marker in self._markers)
            parts.append(min(1.0, num / self.settings.wanted))
        if self.settings.citations:
            parts.append(citation(answer.content, len(PASSAGE.findall(answer.question))).numerator)
        return sum(parts) / len(parts)


@dataclass(slots=True)
class Regex:
    """A pattern of Python's re."""

    settings: RegexReward
    _pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self._pattern = re.compile(self.settings.pattern)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._pattern.search(self._part(answer)) is not None) for answer in answers]

    def _part(self, answer: Answer) -> str:
        parts = {"answer": answer.content, "reasoning": answer.reasoning or "", "all": answer.text}
        return parts[self.settings.where]


def _marker(word: str) -> re.Pattern[str]:
    """Whole words, where words have borders."""
    border = r"\b" if word.isascii() else ""
    return re.compile(f"{border}{re.escape(word)}{border}")
