"""Batches in the order of a prepared file's mix plan: shares that change with the step, short samples in each batch.

The plan and what each row counts as lie in the token file, so every worker draws the same rows from it and a resumed run goes on
with the very next one. Rows that are held out are not drawn. A row comes as often as its source's share wants, whatever `num_epochs`
says of the average; `told` says how many rows never come, and how many come again.
Within `group_window` batches, rows of one kind (a role's short ones, its others) change places, so that batches hold rows of similar
length and each still has what the plan gave it of every kind.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from r1ray.data.prepare.plan import Walk, coverage
from r1ray.train.batches import BatchPlan

__all__ = ["MixedPlan"]


@dataclass(slots=True)
class MixedPlan(BatchPlan):
    """`tokens` is the token file, of which `rows` are trained on, None: all. Asking for a step draws all steps before it once, eight
    bytes a row."""

    tokens: Path = Path()
    rows: Sequence[int] | None = None
    _walk: Walk | None = None
    _drawn: array[int] = field(default_factory=lambda: array("q"))

    def batch(self, step: int) -> tuple[int, ...]:
        end = (step + 1) * self.batch_size
        self._draw(end)
        return tuple(self._drawn[end - self.batch_size : end])

    def told(self, num_steps: int) -> str | None:
        """How many rows so many steps draw never, and how many more than once."""
        end = num_steps * self.batch_size
        self._draw(end)
        found = coverage(np.asarray(self._drawn[:end]), len(self.lengths))
        return f"mix plan: in {num_steps} steps {found.told}"

    def _draw(self, end: int) -> None:
        """Whole windows, none of which reaches into the next epoch: each epoch keeps the rows that the plan gives it."""
        if self._walk is None:
            self._walk = Walk(self.tokens, batch_size=self.batch_size, seed=self.seed, rows=self.rows)
        while len(self._drawn) < end:
            first = len(self._drawn) // self.batch_size
            left = self.steps_per_epoch - first % self.steps_per_epoch
            rows = self._walk.take(min(self.group_window, left) * self.batch_size)
            self._drawn.frombytes(self._grouped(rows, random.Random(f"{self.seed}/{first}")).tobytes())

    def _grouped(self, rows: npt.NDArray[np.int64], rng: random.Random) -> npt.NDArray[np.int64]:
        """Of each kind the shortest rows go to one batch of the window, the next to another, in a random order of the batches."""
        assert self._walk is not None, "drawn from"
        batches = list(range(len(rows) // self.batch_size))
        rng.shuffle(batches)
        kinds = self._walk.kinds[rows]
        lengths = np.fromiter((self.lengths[row] for row in rows), np.int64, len(rows))
        seats = np.lexsort((np.repeat(batches, self.batch_size), kinds))
        grouped = np.empty_like(rows)
        grouped[seats] = rows[np.lexsort((lengths, kinds))]
        return grouped
