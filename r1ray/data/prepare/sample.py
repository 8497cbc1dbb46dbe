"""A uniform sample of a stream's questions, whatever its length. Knows no figure."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pyarrow as pa

from r1ray.data.augment.spans import question_start
from r1ray.types import Conversation

__all__ = ["QuestionSample"]


class QuestionSample:
    """Reservoir sampling (Vitter 1985, algorithm R) of the customers' words in `size` dialogues."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = random.Random(f"{seed}/sample")
        self._num_seen = 0
        self.questions: list[str] = []

    def add(self, conversation: Conversation) -> None:
        if (place := self._place()) is not None:
            self.questions[place : place + 1] = [_questions([m.content for m in conversation.messages if m.role == "user"])]

    def add_table(self, table: pa.Table) -> None:
        """Every row of a prepared table; only drawn rows leave Arrow."""
        for row in range(len(table)):
            if (place := self._place()) is not None:
                turns = table["utterances"][row].as_py()
                self.questions[place : place + 1] = [_questions([turn["text"] for turn in turns if turn["role"] == "user"])]

    def _place(self) -> int | None:
        self._num_seen += 1
        place = len(self.questions) if len(self.questions) < self._size else self._random.randrange(self._num_seen)
        return place if place < self._size else None


def _questions(texts: Sequence[str]) -> str:
    return "\n".join(text[question_start(text) :].strip() for text in texts)
