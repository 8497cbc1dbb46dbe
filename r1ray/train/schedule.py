"""The learning rate over a run: linear warm-up, cosine, floor; by steps, or by time where a budget cuts the run short.

Knows no optimizer and no clock: it is told how far the run is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(slots=True)
class Schedule:
    """`elapsed_s` is set from outside, to the same value on every rank; all else is fixed.

    With `max_seconds` the run's end is not known in steps, so progress is the larger of the shares of steps and of time:
    the factor reaches its floor whichever ends first. Without it the factor depends on the step alone and a resumed run repeats it exactly.
    """

    total_steps: int
    warmup_share: float
    floor_share: float
    max_seconds: float | None = None
    elapsed_s: float = 0.0

    def progress(self, step: int) -> float:
        """Share of the run that is over when `step` steps are done, 0..1."""
        by_step = step / self.total_steps
        by_time = self.elapsed_s / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_step, by_time))

    def factor(self, step: int) -> float:
        """Multiplier of the peak learning rate for the step after `step` done ones; the first is above zero."""
        done = self.progress(step)
        if done < self.warmup_share:
            return min(1.0, max(done, (step + 1) / self.total_steps) / self.warmup_share)
        share = (done - self.warmup_share) / (1 - self.warmup_share)
        return self.floor_share + (1 - self.floor_share) * 0.5 * (1 + math.cos(math.pi * share))

    def is_over(self, step: int, step_seconds: float) -> bool:
        """Whether the next step, taking about `step_seconds`, would not end within the budget."""
        if step >= self.total_steps:
            return True
        return self.max_seconds is not None and self.elapsed_s + 0.5 * step_seconds >= self.max_seconds
