"""Which row comes next when several sources are trained on at once: shares that change with the step, and short samples in each batch.

    mixture = Mixture(stages=((0, {"domain": 0.7, "history": 0.3}),), sources={"domain": 900, "history": 400}, batch_size=16, seed=0)
    mixture.batch()                      # sixteen (source, row) pairs
    saved = mixture.position()           # plain JSON; Mixture.resume(saved) goes on with the very next row

A stage is (first step, weights), so that a curriculum is a mix that changes. The source that lags furthest behind its share is drawn
next: shares hold in every batch to within a row, not only on average. Whether it gives a short row is what brings both the batch nearer
to its share of them and the source nearer to its own: so batches are alike, and a source's rows still come equally often where the two
agree. Each source is walked through in a shuffled order, shuffled anew each time it is used up. Knows no text, no file and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = ["Mixture", "ShortSamples", "Stage"]

Stage = tuple[int, Mapping[str, float]]
Draw = tuple[str, int]
_MOST_OWED = 3.0
"""Short rows that later draws make up for: where a source has none, it cannot be all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortSamples:
    """`share` of every batch are short rows (seed 000: 0.4): the `share` shortest of each source, by its `lengths`, so that all rows come
    equally often; or those of at most `longest`, however many these are.
    """

    lengths: Mapping[str, Sequence[int]]
    share: float = 0.4
    longest: int | None = None

    def are_short(self, source: str, num_rows: int) -> npt.NDArray[np.bool_]:
        """Of the source's rows; of equally long ones the first."""
        lengths = np.asarray(self.lengths[source])
        if len(lengths) != num_rows:
            raise ValueError(f"{len(lengths)} lengths for the {num_rows} rows of {source}")
        if self.longest is not None:
            found: npt.NDArray[np.bool_] = lengths <= self.longest
            return found
        short = np.zeros(num_rows, bool)
        short[np.argsort(lengths, kind="stable")[: round(self.share * num_rows)]] = True
        return short


class Mixture(Iterator[Draw]):
    """An endless iterator of (source, row). `sources` maps a name to its number of rows; one without rows gives its share to the others."""

    def __init__(
        self,
        *,
        stages: Sequence[Stage],
        sources: Mapping[str, int],
        batch_size: int,
        seed: int,
        short: ShortSamples | None = None,
    ) -> None:
        _check(stages, sources, batch_size)
        self._stages = tuple(sorted(stages, key=lambda stage: stage[0]))
        self._batch_size = batch_size
        self._short = short
        self._pools = {name: _pools(name, num_rows, seed, short) for name, num_rows in sources.items() if num_rows}
        self._num_drawn = 0
        self._lag = dict.fromkeys(self._pools, 0.0)
        self._short_lag = 0.0
        self._short_lags = dict.fromkeys(self._pools, 0.0)

    @property
    def step(self) -> int:
        """The batch that the next row belongs to."""
        return self._num_drawn // self._batch_size

    def weights(self, step: int) -> dict[str, float]:
        """Each source's share at `step`, over the sources that have rows; they sum to 1."""
        _, given = next(stage for stage in reversed(self._stages) if stage[0] <= step)
        present = {name: given.get(name, 0.0) for name in self._pools}
        total = sum(present.values())
        if not total:
            raise ValueError(f"at step {step} no source with rows has a weight; weights {dict(given)}, rows in {sorted(self._pools)}")
        return {name: weight / total for name, weight in present.items()}

    def batch(self) -> list[Draw]:
        """The rest of the current step's rows: all of them unless single rows were taken."""
        return [next(self) for _ in range(self._batch_size - self._num_drawn % self._batch_size)]

    def __next__(self) -> Draw:
        weights = self.weights(self.step)
        for name, weight in weights.items():
            self._lag[name] += weight
        source = max((name for name, weight in weights.items() if weight > 0), key=self._lag.__getitem__)
        self._lag[source] -= 1
        self._num_drawn += 1
        return source, self._pool(source).take()

    def position(self) -> dict[str, Any]:
        """Where the walk stands: a few numbers, whatever the size of the sources."""
        pools = {name: [pool.num_taken for pool in pools] for name, pools in self._pools.items()}
        return {"num_drawn": self._num_drawn, "lag": dict(self._lag), "short": [self._short_lag, dict(self._short_lags)], "taken": pools}

    def resume(self, position: Mapping[str, Any]) -> Self:
        """Go on from a saved position of a mixture over the same sources.

        Raises:
            ValueError: the position is of other sources.
        """
        if set(position["taken"]) != set(self._pools):
            raise ValueError(f"the position is of the sources {sorted(position['taken'])}, this mixture has {sorted(self._pools)}")
        self._num_drawn, (self._short_lag, short_lags) = int(position["num_drawn"]), position["short"]
        self._short_lags = dict(short_lags)
        self._lag = {name: float(lag) for name, lag in position["lag"].items()}
        for name, counts in position["taken"].items():
            for pool, num_taken in zip(self._pools[name], counts, strict=True):
                pool.num_taken = int(num_taken)
        return self

    def _pool(self, source: str) -> _Pool:
        """The source's short rows or its others: what leaves the smaller sum of squares of the batch's lag and the source's own."""
        short, others = self._pools[source]
        if self._short is None:
            return short
        batch = self._short_lag + self._short.share
        own = self._short_lags[source] + len(short.rows) / (len(short.rows) + len(others.rows))
        is_short = batch + own > 1 if len(short.rows) and len(others.rows) else bool(len(short.rows))
        self._short_lag = _within(batch - is_short, _MOST_OWED)
        self._short_lags[source] = _within(own - is_short, 1)  # beyond that the batch's share decides alone
        return short if is_short else others


class _Pool:
    """Rows in a shuffled order, another one for each time round."""

    def __init__(self, name: str, rows: npt.NDArray[np.int64], seed: int) -> None:
        self.rows = rows
        self.num_taken = 0
        self._key = [seed, *name.encode()]
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, rows)

    def take(self) -> int:
        turn, place = divmod(self.num_taken, len(self.rows))
        if self._order[0] != turn:
            self._order = turn, np.random.default_rng([*self._key, turn]).permutation(self.rows)
        self.num_taken += 1
        return int(self._order[1][place])


def _pools(name: str, num_rows: int, seed: int, short: ShortSamples | None) -> tuple[_Pool, _Pool]:
    """(short rows, the others); all are in the first where lengths play no part."""
    are_short = np.ones(num_rows, bool) if short is None else short.are_short(name, num_rows)
    return _Pool(name, np.flatnonzero(are_short), seed), _Pool(f"{name}/long", np.flatnonzero(~are_short), seed)


def _within(lag: float, most: float) -> float:
    return max(-most, min(lag, most))


def _check(stages: Sequence[Stage], sources: Mapping[str, int], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, at least 1 is needed")
    if not stages or min(step for step, _ in stages) != 0:
        raise ValueError(f"the first stage must begin at step 0, got the steps {[step for step, _ in stages]}")
    if not any(sources.values()):
        raise ValueError(f"no source has a row: {dict(sources)}")
    if any(weight < 0 for _, weights in stages for weight in weights.values()):
        raise ValueError(f"a weight is negative: {[dict(weights) for _, weights in stages]}")
