"""The demo set: customers of a bank in English and Chinese, made from hand-written wording by a seed.

    paths = write_demo(Path("demo"))     # demo/train.parquet, demo/test.parquet, demo/knowledge/{en,zh}/*.md

Every assistant turn is a JSON line with intent and entities, then one reply grounded in the knowledge base:

    {"intent": "card_lost", "entities": {"card_type": "credit"}}
    Block your credit card in the app right away. A new card costs 15 CNY.

The test set shares no customer phrase and no entity value with the training set. Six kinds of dialogue take turns (`_KINDS`);
in a third of them the last question carries two passages, and the reply cites the one that holds its fact.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from r1ray.data.bank.wording import KNOWLEDGE, Intent, Split, Wording, load_wording
from r1ray.data.write import write_parquet
from r1ray.model.prompts import Language, with_passages
from r1ray.types import Annotations, Conversation, EntityValue, Message

__all__ = ["SYSTEM_PROMPT", "DemoPaths", "demo_conversations", "write_demo"]

SYSTEM_PROMPT = "You are a bank assistant."

# (a question of another intent before, the bank has to ask for the slots, passages with the last question)
_KINDS = (
    (False, False, False),
    (False, False, True),
    (False, True, False),
    (False, False, False),
    (True, False, True),
    (True, True, False),
)
# Dialogues per intent. A Chinese dialogue costs about twice the tokens of an English one.
_NUM_DIALOGUES: dict[Split, dict[Language, int]] = {"train": {"en": 30, "zh": 18}, "test": {"en": 7, "zh": 5}}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPaths:
    """What `write_demo` wrote."""

    train: Path
    test: Path
    knowledge: Path


def write_demo(out: Path, *, seed: int = 0) -> DemoPaths:
    """Write both sets (Parquet, annotated) and the knowledge base below `out`; the same seed gives the same bytes."""
    paths = DemoPaths(train=out / "train.parquet", test=out / "test.parquet", knowledge=out / "knowledge")
    write_parquet(demo_conversations("train", seed=seed), paths.train)
    write_parquet(demo_conversations("test", seed=seed), paths.test)
    shutil.copytree(KNOWLEDGE, paths.knowledge, dirs_exist_ok=True)
    return paths


def demo_conversations(split: Split, *, seed: int = 0) -> tuple[Conversation, ...]:
    """One set in random order; every intent ends equally many dialogues of a language."""
    made: list[Conversation] = []
    for language, num_dialogues in _NUM_DIALOGUES[split].items():
        bank = _Bank(load_wording(language), split, random.Random(f"{seed}/{split}/{language}"))
        for intent in bank.wording.intents.values():
            for number in range(num_dialogues):
                name = f"bank-{split}-{language}-{intent.name}-{number:02d}"
                made.append(Conversation(id=name, messages=tuple(bank.dialogue(intent, number)), source="demo"))
    random.Random(f"{seed}/{split}").shuffle(made)
    return tuple(made)


@dataclass(slots=True)
class _Bank:
    """One language and split. Phrases and values are dealt like cards: each is used before any is used again."""

    wording: Wording
    split: Split
    random: random.Random
    decks: dict[str, Iterator[object]] = field(default_factory=dict)

    def dialogue(self, intent: Intent, number: int) -> Iterator[Message]:
        """The `number`-th dialogue that ends with `intent`."""
        before, asks, passages = _KINDS[number % len(_KINDS)]
        if before:
            others = [other for other in self.wording.intents.values() if other.name != intent.name]
            yield from self._question(self._deal(f"before {intent.name}", others), first=True, passages=False)
        if asks and intent.slots:
            yield from self._asked(intent, first=not before)
        else:
            yield from self._question(intent, first=not before, passages=passages)

    def _question(self, intent: Intent, *, first: bool, passages: bool) -> Iterator[Message]:
        """A question with all its slots and the grounded reply."""
        values = self._values(intent)
        text = self._polite(self._deal(f"phrase {intent.name}", intent.phrases[self.split]).format(**values), first=first)
        reply = intent.reply.format(**values)
        if passages:
            wanted = self.wording.sections[intent.section]
            shown = [wanted, self.random.choice([s for s in self.wording.sections.values() if s.id != wanted.id])]
            self.random.shuffle(shown)
            text = with_passages(text, shown, style="compact")
            space = "" if self.wording.language == "zh" else " "
            reply = f"{reply}{space}[citation:{shown.index(wanted) + 1}]"
        yield Message(role="user", content=text)
        yield _answer(intent, values, reply)

    def _asked(self, intent: Intent, *, first: bool) -> Iterator[Message]:
        """A question without slots, the bank's question for them, the values alone, the grounded reply."""
        values = self._values(intent)
        yield Message(role="user", content=self._polite(self._deal(f"vague {intent.name}", intent.vague[self.split]), first=first))
        yield _answer(intent, {}, intent.ask)
        yield Message(role="user", content=self._deal(f"answer {intent.name}", intent.answers[self.split]).format(**values))
        yield _answer(intent, values, intent.reply.format(**values))

    def _values(self, intent: Intent) -> dict[str, EntityValue]:
        return {slot: self._deal(pool, self.wording.pools[pool][self.split]) for slot, pool in intent.slots.items()}

    def _polite(self, phrase: str, *, first: bool) -> str:
        if not first:
            return self.random.choice(self.wording.next[self.split]) + phrase
        return self.random.choice(self.wording.before[self.split]) + phrase + self.random.choice(self.wording.after[self.split])

    def _deal(self, name: str, items: Sequence[T]) -> T:
        """The next of `items` from a deck of that name, shuffled anew each time it is used up."""
        deck = self.decks.setdefault(name, self._shuffled(items))
        return next(deck)  # type: ignore[return-value]

    def _shuffled(self, items: Sequence[T]) -> Iterator[T]:
        for _ in itertools.count():
            yield from self.random.sample(items, len(items))


def _answer(intent: Intent, values: dict[str, EntityValue], reply: str) -> Message:
    """The assistant's turn: the JSON line and the same values as annotations."""
    line = json.dumps({"intent": intent.name, "entities": values}, ensure_ascii=False)
    return Message(role="assistant", content=f"{line}\n{reply}", annotations=Annotations(intent=intent.name, entities=values))
