"""Batches in the order of a prepared file's mix plan: shares that change with the step, short samples in each batch.

The plan and what each row counts as lie in the token file, so every worker draws the same rows from it and a resumed run goes on
with the very next one. A row comes as often as its source's share wants, whatever `num_epochs` says of the average.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from r1ray.data.prepare.plan import Walk
from r1ray.train.batches import BatchPlan

__all__ = ["MixedPlan"]


@dataclass(slots=True)
class MixedPlan(BatchPlan):
    """`tokens` is the token file. Asking for a step draws all steps before it once."""

    tokens: Path = Path()
    _walk: Walk | None = None
    _drawn: list[tuple[int, ...]] = field(default_factory=list)

    def batch(self, step: int) -> tuple[int, ...]:
        if self._walk is None:
            self._walk = Walk(self.tokens, batch_size=self.batch_size, seed=self.seed)
        while len(self._drawn) <= step:
            self._drawn.append(tuple(self._walk.batch()))
        return self._drawn[step]
