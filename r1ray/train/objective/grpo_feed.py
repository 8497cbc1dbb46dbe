"""Prompts in the plan's order, each as often as it is answered; a group of answers stays on one worker and in one step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from r1ray.train.batches import BatchPlan
from r1ray.train.prompts import Prompt

__all__ = ["Asked", "PromptFeed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One answer to be given: `place` is the prompt's in its batch, so that its seed does not depend on the number of workers."""

    prompt: Prompt
    place: int
    generation: int


@dataclass(slots=True)
class PromptFeed(Dataset[list[dict[str, Any]]]):
    """Every item of a step holds all that this rank is asked in it: answers are written once, then computed in `accumulation` passes.

    An epoch's last batch is filled up by its own prompts again, as groups of their own.
    """

    prompts: Sequence[Prompt]
    plan: BatchPlan
    num_steps: int
    rank: int
    num_workers: int
    accumulation: int
    num_generations: int
    _drawn: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """TRL wants rows with a `prompt`; `asked` is what we read."""
        return [{"prompt": asked.prompt.messages[-1].content, "asked": asked} for asked in self.asked(index // self.accumulation)]

    def asked(self, step: int) -> list[Asked]:
        rows = itertools.islice(itertools.cycle(self.plan.batch(step)), self.plan.batch_size)
        mine = [(place, row) for place, row in enumerate(rows) if place % self.num_workers == self.rank]
        return [
            Asked(prompt=self.prompts[row], place=place, generation=number) for place, row in mine for number in range(self.num_generations)
        ]

    @property
    def answers_per_rank(self) -> int:
        return self.plan.batch_size // self.num_workers * self.num_generations

    def loader(self) -> DataLoader[list[dict[str, Any]]]:
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def num_trained(self, _: int) -> int:
        """Answers of all ranks."""
        return self.plan.batch_size * self.num_generations

    def count(self, step: int, num_tokens: int) -> None:
        """Tokens of a step are known when its answers are."""
        self._drawn = {step: num_tokens}

    def num_tokens(self, step: int) -> int:
        return self._drawn.get(step, 0)


def _only(items: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    (item,) = items
    return item
