"""Tokenised rows in two: those that are trained on and those that are held out, by share and seed.

What is drawn are origins: an augmented row, or an equal one, is on the side of the row that it comes from. Each is drawn on its own, so
rows that are added later move hardly any other row. Knows no tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from r1ray.errors import NothingToTrain
from r1ray.train.order import Material
from r1ray.train.shards import Picked

__all__ = ["Part", "Traced", "draws", "held_out", "parted"]


class Traced(Material, Protocol):
    """Material whose rows say where they come from."""

    def origins(self) -> npt.NDArray[np.uint64]:
        """A hash per row; equal where rows belong on one side."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One side of a material, itself a material; row numbers count within it."""

    whole: Traced
    share: float
    seed: int
    is_held_out: bool

    @cached_property
    def chosen(self) -> array[int]:
        """Row numbers of the whole, in order."""
        found = np.flatnonzero(held_out(self.whole.origins(), self.share, self.seed) == self.is_held_out)
        return array("q", found.astype(np.int64).tobytes())

    @property
    def path(self) -> Path:
        """Of the whole."""
        return self.whole.path

    @property
    def num_rows(self) -> int:
        return len(self.chosen)

    @property
    def told(self) -> str:
        return f"{self.whole.told}; {self.whole.num_rows - self.num_rows} are held out"

    @property
    def is_mixed(self) -> bool:
        """What is held out is measured once and whole, whatever its roles."""
        return self.whole.is_mixed and not self.is_held_out

    @property
    def is_complete(self) -> bool:
        return self.whole.is_complete

    def lengths(self) -> Sequence[int]:
        lengths = self.whole.lengths()
        return array("i", (lengths[row] for row in self.chosen))

    def rows(self) -> Any:
        return tuple(Picked(column, self.chosen) for column in self.whole.rows())

    def __getstate__(self) -> dict[str, Any]:
        """Without the row numbers, which every worker draws alike."""
        return {name: value for name, value in self.__dict__.items() if name != "chosen"}


def parted(material: Traced, share: float, seed: int) -> tuple[Part, Part]:
    """(trained on, held out).

    Raises:
        NothingToTrain: too few rows to part, or all of them come from one.
    """
    if len(np.unique(material.origins())) < 2:
        raise NothingToTrain(
            f"{material.num_rows} rows, all from one origin, cannot be parted by train.eval_share={share:g}. Add rows, or set it to 0."
        )
    trained, held = (Part(whole=material, share=share, seed=seed, is_held_out=is_held_out) for is_held_out in (False, True))
    return trained, held


def held_out(origins: npt.NDArray[np.uint64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """For each row whether it is held out: `share` of the distinct origins, at least one, and never all of two or more."""
    drawn = draws(origins, seed)
    distinct = np.unique(drawn)
    num_held = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    held: npt.NDArray[np.bool_] = drawn <= distinct[num_held - 1]
    return held


def draws(origins: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each row, as if drawn at random, equal where the origins are: SplitMix64's mixing (Steele et al. 2014), one to one."""
    mixed = origins + np.uint64(int.from_bytes(hashlib.sha256(f"held out/{seed}".encode()).digest()[:8], "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
