"""Which of many results are worth a look: the Pareto front, and the one that a stated rule takes from it.

Takes plain numbers. Knows neither Ray nor what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

__all__ = ["Mode", "best_within", "dominates", "front"]

Mode = Literal["max", "min"]


def dominates(a: Sequence[float], b: Sequence[float], modes: Sequence[Mode]) -> bool:
    """Whether `a` is at least as good as `b` in every objective and better in one."""
    signed = [(x, y) if mode == "max" else (-x, -y) for x, y, mode in zip(a, b, modes, strict=True)]
    return all(x >= y for x, y in signed) and any(x > y for x, y in signed)


def front(points: Sequence[Sequence[float]], modes: Sequence[Mode]) -> list[int]:
    """Indices of the points that no other dominates, in order. Equal points stay together; a point with nan or inf is never on it."""
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    return [i for i in finite if not any(dominates(points[j], points[i], modes) for j in finite)]


def best_within(quality: Sequence[float], cost: Sequence[float], limit: float) -> int:
    """Index of the highest quality among those that cost at most `limit`; equal quality goes to the cheaper, then to the earlier.

    Its choice lies on the front of (quality max, cost min). Raises ValueError when nothing finite is within the limit.
    """
    allowed = [i for i, (q, c) in enumerate(zip(quality, cost, strict=True)) if math.isfinite(q) and c <= limit]
    return max(allowed, key=lambda i: (quality[i], -cost[i], -i))
