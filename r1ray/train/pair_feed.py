"""Pairs -> the tensors of this rank's forward passes, in the plan's order: the better answers' sequences, then the worse ones'.

Knows no loss. Shapes: n pairs, 2n sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from r1ray.train.batches import BatchPlan, even_length
from r1ray.train.order import plan_of
from r1ray.train.pairs import PairRow, PairSet
from r1ray.train.reference import Logprobs

if TYPE_CHECKING:
    from r1ray.train.objective.base import Bench

__all__ = ["PairFeed", "collate", "feed_of"]

Pass = dict[str, torch.Tensor]


def collate(rows: Sequence[PairRow], pad_id: int) -> Pass:
    """As TRL's collators for preferences: `input_ids`, `attention_mask` and `completion_mask`, each [2n, T], padded on the right."""
    sides = [(row.prompt, row.chosen) for row in rows] + [(row.prompt, row.rejected) for row in rows]
    length = even_length(max(len(prompt) + len(answer) for prompt, answer in sides), len(sides))
    ids = torch.full((len(sides), length), pad_id)
    real, answered = torch.zeros_like(ids), torch.zeros_like(ids)
    for place, (prompt, answer) in enumerate(sides):
        end = len(prompt) + len(answer)
        ids[place, :end] = torch.tensor(prompt + answer)
        real[place, :end] = 1
        answered[place, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": real, "completion_mask": answered}


@dataclass(slots=True)
class PairFeed(Dataset[Pass]):
    """Item `i` is forward pass `i % accumulation` of step `i // accumulation`; `num_pairs` says how many of its pairs count.

    `reference` has an item's rows before it is asked for, where the loss wants them.
    """

    rows: Sequence[PairRow]
    plan: BatchPlan
    num_steps: int
    rank: int
    num_workers: int
    accumulation: int
    pad_id: int
    reference: Mapping[int, Logprobs] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __getitem__(self, index: int) -> Pass:
        step, number = divmod(index, self.accumulation)
        shared = self.plan.micro_batches(step, rank=self.rank, num_workers=self.num_workers, accumulation=self.accumulation)
        # every rank must take equally many passes: one without pairs computes a pair that does not count
        chosen = shared[number] or (min(self.plan.batch(step), key=lambda row: (self.rows[row].length, row)),)
        item = collate([self.rows[row] for row in chosen], self.pad_id)
        item["num_pairs"] = torch.tensor(len(shared[number]))
        if self.reference:
            for place, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
                item[name] = torch.tensor([self.reference[row][place] for row in chosen])
        return item

    def loader(self) -> DataLoader[Pass]:
        """One item at a time, in order, in this process; accelerate can skip what a resumed run has done."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def num_trained(self, step: int) -> int:
        """Pairs in the whole batch of a step, over all workers: what the loss is divided by."""
        return len(self.plan.batch(step))

    def num_tokens(self, step: int) -> int:
        return sum(self.rows[row].num_tokens for row in self.plan.batch(step))

    def rows_used(self, num_steps: int, *, first: int = 0) -> set[int]:
        """Rows that the steps from `first` on train on, `num_steps` of them or what is left."""
        return {row for step in range(first, min(first + num_steps, self.num_steps)) for row in self.plan.batch(step)}


def feed_of(bench: Bench, rows: Sequence[PairRow], pad_id: int) -> PairFeed:
    """This rank's feed."""
    order = bench.order
    assert isinstance(order.material, PairSet), "the rows have two answers each"
    return PairFeed(
        rows=rows,
        plan=plan_of(order.config, order.material.lengths()),
        num_steps=order.num_steps,
        rank=bench.rank,
        num_workers=bench.num_workers,
        accumulation=bench.accumulation,
        pad_id=pad_id,
    )


def _only(items: list[Pass]) -> Pass:
    (item,) = items
    return item
