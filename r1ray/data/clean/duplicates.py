"""Rows that repeat an earlier row, exactly or nearly, found in batches. Knows neither text nor file: a row is a number with keys.

Only kept rows are remembered, so that a chain of small changes does not drag its far end away with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r1ray.data.clean.index import KeyIndex
from r1ray.data.clean.minhash import U8, U32, U64, short, similarity
from r1ray.data.prepare.config import NearDuplicateConfig

__all__ = ["ExactDuplicates", "NearDuplicates", "keys_of"]

_CANDIDATES = 16  # looked at per key: a key that very many rows share is a template's, and says little


class ExactDuplicates:
    """Rows with equal 64-bit keys."""

    def __init__(self) -> None:
        self._index = KeyIndex(max_rows=1)
        self._num_rows = 0

    @property
    def num_bytes(self) -> int:
        return self._index.num_bytes

    def add(self, keys: U64) -> npt.NDArray[np.int64]:
        """For each key the number of the earlier row that has it, or -1 for a new one; new ones are numbered on from the last."""
        earlier = self.known(keys)
        fresh: dict[int, int] = {}
        for position in np.flatnonzero(earlier < 0):
            key = int(keys[position])
            if key in fresh:
                earlier[position] = fresh[key]
            else:
                fresh[key] = self._num_rows + len(fresh)
        self._index.add(np.fromiter(fresh, np.uint64, len(fresh)), np.arange(self._num_rows, self._num_rows + len(fresh)))
        self._num_rows += len(fresh)
        return earlier

    def known(self, keys: U64) -> npt.NDArray[np.int64]:
        """As `add`, but nothing is remembered."""
        earlier = np.full(len(keys), -1, np.int64)
        positions, rows = self._index.find(keys)
        earlier[positions] = rows
        return earlier


class NearDuplicates:
    """Signatures of the kept rows, found through their bands."""

    def __init__(self, config: NearDuplicateConfig) -> None:
        self._config = config
        self._index = KeyIndex(max_rows=_CANDIDATES)
        self._stored = np.empty((1024, config.num_hashes), np.uint8)
        self._num_rows = 0

    @property
    def num_bytes(self) -> int:
        return self._index.num_bytes + self._stored.nbytes

    def add(self, signatures: U32, groups: U64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """For each row (number of the kept row it repeats or -1, similarity). Rows of different `groups` never repeat each other."""
        brief = short(signatures)
        keys = self._band_keys(signatures, groups)
        repeated, alike = self._among_kept(brief, keys)
        self._in_batch(brief, keys, repeated, alike)
        fresh = np.flatnonzero(repeated == -1)
        rows = np.arange(self._num_rows, self._num_rows + len(fresh))
        self._store(brief[fresh])
        self._index.add(keys[fresh].ravel(), np.repeat(rows, keys.shape[1]))
        inside = repeated <= -2  # a row of this batch, as -2 - its position: it has its number only now
        numbers = np.full(len(brief), -1, np.int64)
        numbers[fresh] = rows
        repeated[inside] = numbers[-2 - repeated[inside]]
        return repeated, alike

    def _among_kept(self, brief: U8, keys: U64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        repeated, alike = np.full(len(brief), -1, np.int64), np.zeros(len(brief))
        entries, rows = self._index.find(keys.ravel())
        pairs = np.unique(np.stack((entries // keys.shape[1], rows)), axis=1)
        scores = similarity(brief[pairs[0]], self._stored[pairs[1]])
        good = np.flatnonzero(scores >= self._config.threshold)
        for place in good[np.argsort(scores[good], kind="stable")]:  # the most similar one is written last
            repeated[pairs[0, place]], alike[pairs[0, place]] = pairs[1, place], scores[place]
        return repeated, alike

    def _in_batch(self, brief: U8, keys: U64, repeated: npt.NDArray[np.int64], alike: npt.NDArray[np.float64]) -> None:
        """Rows that share a key with another row of the batch, in order, against those kept before them."""
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared = (counts[inverse] > 1).reshape(keys.shape)
        members: defaultdict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(shared.any(axis=1)):
            if repeated[row] != -1:
                continue
            mine = [int(key) for key in keys[row, shared[row]]]
            others = np.array(sorted({other for key in mine for other in members[key][:_CANDIDATES]}), np.int64)
            scores = similarity(brief[row], brief[others]) if len(others) else np.zeros(0)
            if len(scores) and scores.max() >= self._config.threshold:
                repeated[row], alike[row] = -2 - others[scores.argmax()], scores.max()
                continue
            for key in mine:
                members[key].append(int(row))

    def _band_keys(self, signatures: U32, groups: U64) -> U64:
        """(N, num_bands) keys; equal only for equal bands at the same place in the same group."""
        num_bands = self._config.num_bands
        bands = signatures.reshape(len(signatures), num_bands, -1).astype(np.uint64)
        random = np.random.default_rng(num_bands)
        factors = random.integers(0, 2**63, bands.shape[2], dtype=np.uint64) | np.uint64(1)
        salts = random.integers(0, 2**63, num_bands, dtype=np.uint64)
        keys = (bands * factors).sum(axis=2, dtype=np.uint64) + salts + groups[:, None] * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
        keys *= np.uint64(0xBF58476D1CE4E5B9)
        result: U64 = keys ^ (keys >> np.uint64(32))
        return result

    def _store(self, brief: U8) -> None:
        needed = self._num_rows + len(brief)
        if needed > len(self._stored):
            grown = np.empty((max(needed, 2 * len(self._stored)), self._stored.shape[1]), np.uint8)
            grown[: self._num_rows] = self._stored[: self._num_rows]
            self._stored = grown
        self._stored[self._num_rows : needed] = brief
        self._num_rows = needed


def keys_of(texts: Sequence[str]) -> U64:
    """Python's 64-bit string hashes; equal within one process only."""
    return np.fromiter((hash(text) & 0xFFFFFFFFFFFFFFFF for text in texts), np.uint64, len(texts))
