"""Which layers go into which stage of a pipeline. Arithmetic on sizes only; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from r1ray.errors import InvalidValue

__all__ = ["split_layers"]


def split_layers(costs: Sequence[float], num_stages: int, *, before: float = 0.0, after: float = 0.0) -> list[tuple[int, int]]:
    """Contiguous ranges [first, last) of layers, the dearest stage as cheap as can be.

    Args:
        costs: What each layer costs: bytes where memory binds, seconds where time does.
        num_stages: How many ranges; each gets at least one layer.
        before: Cost of what the first stage has besides (the embedding).
        after: Cost of what the last stage has besides (the head).

    Raises:
        InvalidValue: fewer layers than stages.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise InvalidValue(f"{num_stages} stages for {num_layers} layers; a stage needs one at least. Set engine.stages to 1-{num_layers}.")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(first: int, last: int) -> float:
        return sums[last] - sums[first] + (before if first == 0 else 0.0) + (after if last == num_layers else 0.0)

    # least[stages][last]: the dearest stage when the first `last` layers fill `stages` stages, and where the last of these begins
    least: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stages in range(1, num_stages + 1):
        ends = range(stages, num_layers - (num_stages - stages) + 1)
        least.append({last: _cheapest(least[-1], last, cost_of) for last in ends})
    ranges: list[tuple[int, int]] = []
    last = num_layers
    for stages in range(num_stages, 0, -1):
        first = least[stages][last][1]
        ranges.insert(0, (first, last))
        last = first
    return ranges


def _cheapest(fewer: dict[int, tuple[float, int]], last: int, cost_of: object) -> tuple[float, int]:
    assert callable(cost_of)
    return min((max(cost, cost_of(first, last)), first) for first, (cost, _) in fewer.items() if first < last)
