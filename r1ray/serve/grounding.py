"""Passages into the question, citations out of the answer. Plain: the search itself is behind `Finder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from r1ray.model.prompts import with_passages
from r1ray.retrieval.cite import cited
from r1ray.serve.config import RetrievalArgs
from r1ray.types import Message, Passage

__all__ = ["Finder", "Grounding"]


class Finder(Protocol):
    """The Retrieval deployment, or a list in a test."""

    async def search(self, collection: str, query: str, k: int) -> list[Passage]: ...


@dataclass(frozen=True, slots=True)
class Grounding:
    """How answers are grounded: where passages come from and how they are put."""

    finder: Finder
    args: RetrievalArgs

    async def ground(self, collection: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Passage, ...]]:
        """The messages with passages in the last user turn, and those passages. Unchanged when nothing is asked or found."""
        last = next((at for at in range(len(messages) - 1, -1, -1) if messages[at].role == "user"), None)
        if last is None or not messages[last].content.strip():
            return messages, ()
        question = messages[last].content
        passages = await self.finder.search(collection, question, self.args.top_k)
        grounded = replace(messages[last], content=with_passages(question, passages, style=self.args.style))
        return (*messages[:last], grounded, *messages[last + 1 :]), tuple(passages)

    def citations(self, answer: str, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        """The passages that the answer cites; `index` is the number in its `[citation:X]`."""
        found = [(passages.index(passage) + 1, passage) for passage in cited(answer, passages)]
        return [self._citation(index, passage) for index, passage in found]

    def _citation(self, index: int, passage: Passage) -> dict[str, Any]:
        citation = {"index": index, "id": passage.id, "source": passage.source, "heading": passage.heading}
        return citation | ({"text": passage.text} if self.args.include_text else {})
