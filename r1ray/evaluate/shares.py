"""One representation for every metric: a quotient of sums over examples, and its bootstrap interval.

metric = sum(numerator) / sum(denominator)          accuracy, rates, ROUGE, micro-F1
perplexity = exp(sum(negative log likelihood) / sum(tokens))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Share", "interval", "quotient"]


class Share(NamedTuple):
    """What one example adds to a metric's numerator and denominator."""

    numerator: float
    denominator: float


def quotient(shares: Sequence[Share], *, exponential: bool = False) -> float | None:
    """None when nothing was to be counted."""
    below = sum(s.denominator for s in shares)
    if below == 0:
        return None
    value = sum(s.numerator for s in shares) / below
    return _exp(value) if exponential else value


def interval(shares: Sequence[Share], *, num: int, seed: int, exponential: bool = False) -> tuple[float, float] | None:
    """95 % percentile interval of `num` resamples of the examples (Efron's bootstrap); None when nothing was to be counted."""
    values = np.array(shares, dtype=np.float64).reshape(-1, 2)
    if num == 0 or values[:, 1].sum() == 0:
        return None
    rng = np.random.default_rng(seed)
    drawn = np.stack([values[rng.integers(len(values), size=len(values))].sum(axis=0) for _ in range(num)])
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return (_exp(float(low)), _exp(float(high))) if exponential else (float(low), float(high))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # above that a float overflows; the model knows nothing either way
