"""Which rows to leave out so that classes and sources are in proportion. Knows only one label per row and a seeded draw.

Every choice is by the hash of a row's id: the same rows go in any order of the input, and a new row moves few old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["beyond_cap", "beyond_ratio", "beyond_share", "draw"]

Mask = npt.NDArray[np.bool_]
Draws = npt.NDArray[np.float64]


def draw(seed: int, what: str, name: str) -> float:
    """Uniform in [0, 1) for a row's id; `what` keeps choices independent of each other. Copies `id#x` share their stem's draw."""
    digest = hashlib.blake2b(f"{seed}:{what}:{name.partition('#')[0]}".encode(), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56


def beyond_cap(labels: npt.NDArray[np.int64], draws: Draws, alive: Mask, cap: int) -> Mask:
    """Living rows over `cap` per label; label -1 is no label and has no cap."""
    gone = np.zeros(len(labels), bool)
    for label in np.unique(labels[alive & (labels >= 0)]):
        rows = np.flatnonzero(alive & (labels == label))
        gone[rows[np.argsort(draws[rows], kind="stable")[cap:]]] = True
    return gone


def beyond_ratio(is_negative: Mask, is_positive: Mask, draws: Draws, alive: Mask, limits: tuple[float, float]) -> Mask:
    """Rows to drop so that there are `limits` negatives per positive; nothing where one class is empty."""
    least, most = limits
    negatives, positives = np.flatnonzero(alive & is_negative), np.flatnonzero(alive & is_positive)
    gone = np.zeros(len(alive), bool)
    if not len(negatives) or not len(positives):
        return gone
    ratio = len(negatives) / len(positives)
    if ratio > most:
        gone[_last(negatives, draws, int(len(positives) * most))] = True
    elif ratio < least:
        gone[_last(positives, draws, int(len(negatives) / least))] = True
    return gone


def beyond_share(rows: Sequence[int] | npt.NDArray[np.int64], draws: Draws, num_kept: int, total: int) -> Mask:
    """All of `rows` but the `num_kept` that are drawn first."""
    gone = np.zeros(total, bool)
    gone[_last(np.asarray(rows, np.int64), draws, num_kept)] = True
    return gone


def _last(rows: npt.NDArray[np.int64], draws: Draws, num_kept: int) -> npt.NDArray[np.int64]:
    return rows[np.argsort(draws[rows], kind="stable")[num_kept:]]
