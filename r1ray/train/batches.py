"""Which dialogue goes into which forward pass of which worker: decided once, from lengths and a seed.

    plan = BatchPlan(lengths, batch_size=16, num_epochs=1, seed=0, group_window=8)
    plan.micro_batches(step, rank=0, num_workers=2, accumulation=2)    # -> two tuples of row numbers

The batches do not depend on the number of workers, and no row is dropped: a last, smaller batch leaves some forward passes empty.
Padding is kept low twice: batches hold rows of similar length, and each is sorted before it is shared out.
Knows only lengths; no token, no torch.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["BatchPlan", "accumulation_steps", "even_length"]

_MEASURED_STEPS = 2000
_EVEN = 8
"""Positions. Matrix products of other sizes take up to a quarter longer on CPUs (docs/training.md), on GPUs tensor cores want it."""


def accumulation_steps(batch_size: int, num_workers: int, micro_batch_size: int) -> int:
    """Forward passes per worker and optimizer step, so that no pass holds more than `micro_batch_size` rows."""
    return math.ceil(math.ceil(batch_size / num_workers) / micro_batch_size)


def even_length(longest: int, num_rows: int) -> int:
    """Positions that each of `num_rows` rows is padded to, the fewest that make a multiple of eight of all of them."""
    unit = _EVEN // math.gcd(_EVEN, num_rows)
    return math.ceil(longest / unit) * unit


@dataclass(slots=True)
class BatchPlan:
    """The order of the data over all epochs; twelve bytes a row."""

    lengths: Sequence[int]
    batch_size: int
    num_epochs: int
    seed: int
    group_window: int
    _epochs: dict[int, _Order] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs

    def batch(self, step: int) -> tuple[int, ...]:
        """Row numbers of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._epoch(epoch)}
        return self._epochs[epoch].batch(within, self.batch_size)

    def micro_batches(self, step: int, *, rank: int, num_workers: int, accumulation: int) -> tuple[tuple[int, ...], ...]:
        """The rank's `accumulation` forward passes, shortest rows first; a pass may be empty, so that all ranks take equally many."""
        ordered = sorted(self.batch(step), key=lambda row: (self.lengths[row], row))
        mine = [row for place, row in enumerate(ordered) if _owner(place, num_workers) == rank]
        size = math.ceil(math.ceil(self.batch_size / num_workers) / accumulation)
        return tuple(tuple(mine[start * size : (start + 1) * size]) for start in range(accumulation))

    def told(self, num_steps: int) -> str | None:  # noqa: ARG002 - a plan of another order needs them
        """What a job should say of how often rows come in so many steps; None where each comes once an epoch."""
        return None

    def padding_share(self, num_workers: int, accumulation: int) -> float:
        """Share of the computed positions that are padding, in the first epoch or the first of its steps that show it well enough."""
        computed = real = 0
        for step in range(min(self.steps_per_epoch, _MEASURED_STEPS)):
            for rank in range(num_workers):
                for rows in self.micro_batches(step, rank=rank, num_workers=num_workers, accumulation=accumulation):
                    if rows:
                        computed += even_length(max(self.lengths[row] for row in rows), len(rows)) * len(rows)
                    real += sum(self.lengths[row] for row in rows)
        return 1 - real / computed

    def _epoch(self, epoch: int) -> _Order:
        """Shuffle; sort by length within windows of several batches; cut; shuffle the batches, the incomplete one last."""
        rng = random.Random(f"{self.seed}/{epoch}")
        rows = array("q", range(len(self.lengths)))
        rng.shuffle(rows)
        window = self.batch_size * self.group_window
        if self.group_window > 1:
            for start in range(0, len(rows), window):
                rows[start : start + window] = array("q", sorted(rows[start : start + window], key=self.lengths.__getitem__))
        batches = array("i", range(len(rows) // self.batch_size))
        rng.shuffle(batches)
        return _Order(rows, batches)


@dataclass(frozen=True, slots=True)
class _Order:
    """An epoch: rows in the order in which they were cut into batches, and the order of the complete ones."""

    rows: array[int]
    batches: array[int]

    def batch(self, within: int, size: int) -> tuple[int, ...]:
        number = self.batches[within] if within < len(self.batches) else within
        return tuple(self.rows[number * size : (number + 1) * size])


def _owner(place: int, num_workers: int) -> int:
    """Sorted rows are dealt to and fro (0 1 1 0 0 1 1 0 ...), which evens out the workers' token counts."""
    turn, seat = divmod(place, num_workers)
    return seat if turn % 2 == 0 else num_workers - 1 - seat
