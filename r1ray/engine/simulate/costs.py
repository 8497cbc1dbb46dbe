"""How long a step of the engine takes: fitted to measured steps here, or given by a plan.

Knows no hardware and no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from r1ray.errors import InvalidValue

__all__ = ["Sample", "StepCost", "StepTime", "fit"]

REWEIGHTED = 5


class StepTime(Protocol):
    """How long a step takes that reads `prefill_tokens` of prompts and draws a token for each of `rows` streams.

    `context_tokens` are the positions that those streams attend to, summed. At equal rows the time must be nearly a straight line over
    them: a leap takes the mean of its first and its last step.
    """

    def seconds(self, prefill_tokens: float, rows: float, context_tokens: float) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The StepTime of straight lines: `fixed` plus what is in the step."""

    fixed: float
    per_prefill_token: float
    per_row: float
    per_context_token: float

    def seconds(self, prefill_tokens: float, rows: float, context_tokens: float) -> float:
        return self.fixed + prefill_tokens * self.per_prefill_token + rows * self.per_row + context_tokens * self.per_context_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Measured: `seconds` for `steps` steps, everything else summed over them."""

    seconds: float
    prefill_tokens: float = 0
    rows: float = 0
    context_tokens: float = 0
    steps: float = 1


def fit(samples: Sequence[Sample]) -> StepCost:
    """Least squares on errors relative to what is expected, no cost below zero.

    Relative to what was measured they would count a slow sample for less than a quick one, and noise would make every cost too small.

    Raises:
        InvalidValue: fewer samples than unknowns, or a step that took no time.
    """
    if len(samples) < 4 or any(sample.seconds <= 0 for sample in samples):
        raise InvalidValue(f"A step cost has 4 unknowns; {len(samples)} samples, all longer than 0 s, are too few. Measure more steps.")
    seconds = np.array([sample.seconds for sample in samples])
    parts = np.array([(s.steps, s.prefill_tokens, s.rows, s.context_tokens) for s in samples], dtype=float)
    expected = seconds
    for _ in range(REWEIGHTED):
        costs = _least_squares(parts / expected[:, None], seconds / expected)
        expected = np.maximum(parts @ costs, 0.1 * seconds)
    fixed, per_prefill_token, per_row, per_context_token = map(float, costs)
    return StepCost(fixed=fixed, per_prefill_token=per_prefill_token, per_row=per_row, per_context_token=per_context_token)


def _least_squares(parts: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs of the parts; one that would be negative is left out."""
    used = list(range(parts.shape[1]))
    while True:
        scale = np.maximum(np.abs(parts[:, used]).max(axis=0), 1e-30)
        solved = np.linalg.lstsq(parts[:, used] / scale, wanted, rcond=None)[0] / scale
        if (solved >= 0).all():
            break
        used.pop(int(np.argmin(solved * scale)))
    costs = np.zeros(parts.shape[1])
    costs[used] = solved
    return costs
