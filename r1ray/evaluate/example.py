"""Dialogues into examples: the last assistant turn is the gold answer, the turns before it are the question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from r1ray.errors import EvaluationError
from r1ray.model.prompts import Language, detect_language
from r1ray.types import Conversation, Message

__all__ = ["Example", "examples_of"]

PASSAGE = re.compile(r"\[webpage (\d+) begin\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question and its gold answer. `num_passages` counts the passages in the question's last turn."""

    id: str
    source: str
    prompt: tuple[Message, ...]
    gold: Message
    language: Language
    num_passages: int

    @property
    def question(self) -> str:
        return self.prompt[-1].content


def examples_of(conversations: Sequence[Conversation]) -> list[Example]:
    """Raises EvaluationError when there is none, or when dialogues have nothing to ask or to compare with."""
    if not conversations:
        raise EvaluationError("The evaluation set has no dialogue. Give a file with at least one.")
    unusable = [c for c in conversations if _last_assistant(c) < 1]
    if unusable:
        raise EvaluationError(
            f"{len(unusable)} of {len(conversations)} dialogues have no assistant turn after a question, first {_name(unusable[0])}. "
            "Evaluation compares with that turn: add it, or leave these dialogues out."
        )
    return [_example(c, _last_assistant(c)) for c in conversations]


def _example(conversation: Conversation, index: int) -> Example:
    prompt = conversation.messages[:index]
    return Example(
        id=conversation.id,
        source=conversation.source,
        prompt=prompt,
        gold=conversation.messages[index],
        language=detect_language(_own_words(prompt[-1].content)),
        num_passages=len(PASSAGE.findall(prompt[-1].content)),
    )


def _last_assistant(conversation: Conversation) -> int:
    """Its index, -1 without one."""
    return max((i for i, m in enumerate(conversation.messages) if m.role == "assistant"), default=-1)


def _own_words(text: str) -> str:
    """The question without its passages, which may be in another language."""
    return text.rsplit(" end]", 1)[-1].strip() or text


def _name(conversation: Conversation) -> str:
    return f"{conversation.id} ({conversation.source})" if conversation.source else conversation.id
