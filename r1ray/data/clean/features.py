"""Twenty figures about the last question and answer of a dialogue that tell broken text from sound text in any domain.

They see form, not truth: repetition, truncation, gibberish, an echoed question, mangled characters. Knows no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r1ray.data.mangled import mangled
from r1ray.types import Conversation

__all__ = ["NAMES", "features", "last_exchange"]

NAMES = (
    "answer_log_length",
    "answer_is_short",
    "letters",
    "han",
    "digits",
    "other_marks",
    "distinct_fragments",
    "distinct_words",
    "longest_run",
    "echo",
    "ends_sentence",
    "ends_inside",
    "open_brackets",
    "function_words",
    "no_vowel_words",
    "mean_word_length",
    "upper_case",
    "mangled",
    "question_log_length",
    "question_distinct_fragments",
)
_LOOKED_AT = 1500
_WINDOW = 200
_DIGIT, _UPPER = re.compile(r"\d"), re.compile(r"[A-Z]")
_UNSPEAKABLE = re.compile(r"^[^aeiouy]*$|[^aeiouy]{5}", re.I)
_ITEM = re.compile(r"\s*(?:[-*•|]|\(?\w{1,3}[.、)）])")
_SENTENCE_END = re.compile(r"[。！？!?;；，]|[.,:](?=\s)")
_WORD = re.compile(r"[A-Za-z]+|[\u3400-\u9fff]")
_HAN = re.compile(r"[\u3400-\u9fff]")
_RUN = re.compile(r"(.)\1{3,}", re.S)
_FUNCTION = frozenset(
    """the be to of and a in that have i it for not on with he as you do at this but by from they we will my your is are was can if or an so
    的 了 是 在 我 有 和 不 您 你 请 可 以 一 这 个 到 就 要 会 能 也 为 与 或 及""".split()  # noqa: SIM905
)
_ENDS = frozenset("。！？.!?…”\"'）)】]:：;；}`")
_BRACKETS = (("(", ")"), ("（", "）"), ("[", "]"), ("{", "}"), ("《", "》"), ("“", "”"))


def last_exchange(conversation: Conversation) -> tuple[str, str]:
    """The last user turn and the last assistant turn."""
    answer = next((m.content for m in reversed(conversation.messages) if m.role == "assistant"), "")
    question = next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
    return question, answer


def features(conversations: Sequence[Conversation]) -> npt.NDArray[np.float64]:
    """(rows, 20) in the order of `NAMES`."""
    return np.array([_row(*last_exchange(c)) for c in conversations], np.float64).reshape(len(conversations), len(NAMES))


def _row(question: str, answer: str) -> tuple[float, ...]:
    question, answer = question[-_LOOKED_AT:], answer.strip()
    num_chars = max(len(answer), 1)
    tail = answer[-1:]
    answer = answer[:_LOOKED_AT]
    seen = max(len(answer), 1)
    words = _WORD.findall(answer)
    latin = [word for word in words if word.isascii()]
    num_han = len(words) - len(latin)
    num_letters = sum(map(len, latin))
    num_digits = len(_DIGIT.findall(answer))
    num_blank = len(answer) - sum(map(len, answer.split()))
    fragments, asked = _fragments(answer), _fragments(question)
    last_line = question.rstrip().rpartition("\n")[2]
    is_short = len(answer) < 40
    return (
        math.log1p(num_chars),
        float(is_short),
        num_letters / seen,
        num_han / seen,
        num_digits / seen,
        (seen - num_letters - num_han - num_digits - num_blank) / seen,
        _distinct(answer, fragments),
        len(set(words)) / max(len(words), 1) if len(words) > 8 else 1.0,
        min(max((len(run[0]) for run in _RUN.finditer(answer)), default=0), 20) / 20,
        0.0 if is_short and tail not in _ENDS else _overlap(fragments, asked if last_line == question else _fragments(last_line)),
        float(tail in _ENDS),
        float(_breaks_off(answer, tail)),
        float(any(answer.count(left) != answer.count(right) for left, right in _BRACKETS)),
        sum(word.lower() in _FUNCTION for word in words) / max(len(words), 1),
        _no_vowels(latin),
        min(num_letters / max(len(latin), 1), 20) / 20,
        len(_UPPER.findall(answer)) / seen,
        min(mangled(answer).share, 0.5) + min(mangled(question).share, 0.5),
        math.log1p(len(question)),
        _distinct(question, asked),
    )


def _fragments(text: str) -> set[str]:
    return set(map("".join, zip(text, text[1:], text[2:], text[3:], strict=False))) if len(text) > 3 else {text}


def _distinct(text: str, fragments: set[str]) -> float:
    """Mean share of different fragments in windows of equal size: a longer text repeats more of itself anyway."""
    if len(text) <= _WINDOW:
        return len(fragments) / (len(text) - 3) if len(text) > 20 else 1.0
    windows = [text[start : start + _WINDOW] for start in range(0, len(text), _WINDOW)]
    shares = [len(_fragments(window)) / (len(window) - 3) for window in windows if len(window) > 20]
    return sum(shares) / len(shares) if shares else 1.0


def _overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / max(len(left | right), 1)


def _breaks_off(answer: str, tail: str) -> bool:
    """A text of sentences whose last line is long and ends without a mark: a list's last item or a label is none."""
    last = answer.rpartition("\n")[2]
    return tail not in _ENDS and len(last) > 20 and not _ITEM.match(last) and _SENTENCE_END.search(answer) is not None


def _no_vowels(words: Sequence[str]) -> float:
    """Share of longer words that nobody can pronounce: without vowel, or with five consonants in a row."""
    longer = [word for word in words if len(word) > 3 and word[1:].islower()]  # abbreviations are sound
    return sum(1 for word in longer if _UNSPEAKABLE.search(word)) / max(len(longer), 3)
