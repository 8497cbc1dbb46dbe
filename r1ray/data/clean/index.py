"""From 64-bit keys to the rows that have them: sorted arrays in levels, each about twice the one before, merged as they grow.

Sixteen bytes an entry, all work in numpy; a dict of Python integers takes six times as much. Knows not what a key means.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["KeyIndex"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


class KeyIndex:
    """Many rows may have one key; `find` gives the first `max_rows` of each level."""

    def __init__(self, max_rows: int = 16) -> None:
        self._max_rows = max_rows
        self._levels: list[tuple[U64, I64]] = []

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + rows.nbytes for keys, rows in self._levels)

    def add(self, keys: U64, rows: I64) -> None:
        """Entries `keys[i] -> rows[i]`."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        level = keys[order], rows[order]
        while self._levels and len(self._levels[-1][0]) <= 2 * len(level[0]):
            level = _merged(self._levels.pop(), level)
        self._levels.append(level)

    def find(self, keys: U64) -> tuple[I64, I64]:
        """Pairs (position in `keys`, row) of equal keys."""
        order = np.argsort(keys, kind="stable")  # sorted questions walk through a level instead of jumping in it
        wanted = keys[order]
        positions, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for level_keys, level_rows in self._levels:
            first = np.searchsorted(level_keys, wanted, "left")
            counts = np.minimum(np.searchsorted(level_keys, wanted, "right") - first, self._max_rows)
            hit = np.flatnonzero(counts)
            repeats = counts[hit]
            within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            positions.append(np.repeat(order[hit], repeats))
            found.append(level_rows[np.repeat(first[hit], repeats) + within])
        return np.concatenate(positions), np.concatenate(found)


def _merged(old: tuple[U64, I64], new: tuple[U64, I64]) -> tuple[U64, I64]:
    keys, rows = np.concatenate((old[0], new[0])), np.concatenate((old[1], new[1]))
    order = np.argsort(keys, kind="stable")
    return keys[order], rows[order]
