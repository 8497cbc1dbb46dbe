"""Which passages an answer cites. `[citation:X]` counts the passages of the prompt from 1 (DeepSeek-R1's web search template)."""

from __future__ import annotations

from collections.abc import Sequence

from r1ray.model.prompts import CITATION
from r1ray.types import Passage

__all__ = ["cited", "invalid_citations"]


def cited(text: str, passages: Sequence[Passage]) -> list[Passage]:
    """The passages that `text` cites, each once, in the order of their first mention; numbers without a passage are left out."""
    return [passages[number - 1] for number in _numbers(text) if 1 <= number <= len(passages)]


def invalid_citations(text: str, num_passages: int) -> list[int]:
    """The cited numbers for which no passage was given: what an answer made up."""
    return [number for number in _numbers(text) if not 1 <= number <= num_passages]


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(int(match[1]) for match in CITATION.finditer(text)))
