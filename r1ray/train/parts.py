"""Tokenised rows in two: those that are trained on and those that are held out, by share and seed.

Knows no tokens: any material whose rows are columns of equal length can be parted.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from r1ray.errors import NothingToTrain
from r1ray.train.order import Material
from r1ray.train.shards import Picked

__all__ = ["Part", "parted"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One side of a material, itself a material; row numbers count within it."""

    whole: Material
    share: float
    seed: int
    is_held_out: bool

    @cached_property
    def chosen(self) -> array[int]:
        """Row numbers of the whole, in order."""
        total = self.whole.num_rows
        held = set(random.Random(f"{self.seed}/held out").sample(range(total), max(1, round(self.share * total))))
        return array("q", (row for row in range(total) if (row in held) == self.is_held_out))

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
        """A mix plan counts on all rows."""
        return False

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


def parted(material: Material, share: float, seed: int) -> tuple[Part, Part]:
    """(trained on, held out).

    Raises:
        NothingToTrain: too few rows to part.
    """
    if material.num_rows < 2:
        raise NothingToTrain(f"{material.num_rows} rows cannot be parted by train.eval_share={share:g}. Add rows, or set it to 0.")
    trained, held = (Part(whole=material, share=share, seed=seed, is_held_out=is_held_out) for is_held_out in (False, True))
    return trained, held
