"""Adversarial rows (seed 000: logic traps) whose right answer is known without a model.

distractor  a sentence that has nothing to do with the question comes first; the answer stays
conflict    the customer names a second value for the same thing; the right answer asks which one holds
converse    all A are B, this is B, so it is an A: the right answer says that it does not follow; another two turns
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from r1ray.data.augment.config import TrapsConfig
from r1ray.data.augment.provenance import Made, recorded
from r1ray.data.augment.rules import EntityPools, read_wording, replaceable, rng_of
from r1ray.data.augment.spans import bounded, question_start
from r1ray.model.prompts import detect_language
from r1ray.types import Annotations, Conversation, EntityValue, Message

__all__ = ["LogicTraps"]


class LogicTraps:
    """Tries the kinds in random order until one fits the row."""

    name = "traps"

    def __init__(self, config: TrapsConfig, seed: int, pools: EntityPools) -> None:
        self._kinds = config.kinds
        self._seed = seed
        self._pools = pools
        self._wording = read_wording(config.wording, "traps")

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        return [self._one(row) for row in rows]

    def _one(self, row: Conversation) -> Made | None:
        if len(row.messages) < 2 or row.messages[-2].role != "user":
            return None
        rng = rng_of(self._seed, self.name, row)
        question = row.messages[-2].content
        wording = self._wording.get(detect_language(question[question_start(question) :]))
        if wording is None:
            return None
        make = {"distractor": self._distractor, "conflict": self._conflict, "converse": self._converse}
        for kind in rng.sample(self._kinds, len(self._kinds)):
            messages = make[kind](row, wording, rng)
            if messages is not None:
                return recorded(row, messages, name=f"traps.{kind}", seed=self._seed)
        return None

    def _distractor(self, row: Conversation, wording: Mapping[str, Any], rng: random.Random) -> list[Message]:
        *before, question, answer = row.messages
        text, start = question.content, question_start(question.content)
        start += len(text[start:]) - len(text[start:].lstrip())
        return [*before, replace(question, content=text[:start] + rng.choice(wording["distractor"]) + text[start:]), answer]

    def _conflict(self, row: Conversation, wording: Mapping[str, Any], rng: random.Random) -> list[Message] | None:
        """Only where the answer is annotated, so that it is known what the values mean, and the last question names one."""
        *before, question, answer = row.messages
        if answer.annotations is None or not answer.annotations.entities:
            return None
        language = detect_language(question.content[question_start(question.content) :])
        for name, value in answer.annotations.entities.items():
            other = self._pools.other(row, name, rng)
            named = bounded(value).search(question.content, question_start(question.content)) is not None
            if other is None or not named or not replaceable(row, value):
                continue
            fill = {"value": str(value), "other": str(other)}
            doubt = rng.choice(wording["conflict"]["question"]).format(**fill)
            ask = rng.choice(wording["conflict"]["answer"]).format(**fill)
            space = "" if language == "zh" else " "
            return [*before, replace(question, content=f"{question.content}{space}{doubt}"), _asking(answer, name, ask)]
        return None

    def _converse(self, row: Conversation, wording: Mapping[str, Any], rng: random.Random) -> list[Message] | None:
        """Not after a labelled answer: a set of labels has none for this question."""
        if row.messages[-1].annotations is not None:
            return None
        fact = rng.choice(wording["converse"]["facts"])
        question, answer = (rng.choice(wording["converse"][part]).format(**fact) for part in ("question", "answer"))
        return [*row.messages, Message(role="user", content=question), Message(role="assistant", content=answer)]


def _asking(answer: Message, name: str, ask: str) -> Message:
    """The same intent without the doubtful entity; a first line of JSON says the same."""
    assert answer.annotations is not None
    entities: dict[str, EntityValue] = {key: value for key, value in answer.annotations.entities.items() if key != name}
    head = answer.content.partition("\n")[0]
    try:
        tree = json.loads(head)
    except ValueError:
        tree = None
    text = ask
    if isinstance(tree, dict) and isinstance(tree.get("entities"), dict):
        tree["entities"].pop(name, None)
        text = f"{json.dumps(tree, ensure_ascii=False)}\n{ask}"
    return replace(answer, content=text, reasoning=None, annotations=Annotations(intent=answer.annotations.intent, entities=entities))
