"""The base's log-probability of every answer, which DPO measures from: computed once, kept beside the tokens.

The file is named by the token set, the base's weights and the number type; a run that needs only some rows adds only those. NaN is
a row that nobody has asked for yet. Knows no model: who computes a row is told by the trainer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.train.order import WorkOrder
from r1ray.train.pairs import PairSet

__all__ = ["Logprobs", "Reference"]

Logprobs = tuple[float, float]
"""Of the better and the worse answer, summed over their tokens."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A Parquet file of columns `chosen` and `rejected`; rows to train on first, then the held-out ones."""

    path: Path

    @classmethod
    def of(cls, order: WorkOrder) -> Reference:
        assert isinstance(order.material, PairSet), "the rows have two answers each"
        parts = [order.material.path.stem, order.base.manifest.weights_sha256, order.dtype]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        return cls(order.settings.cache / "reference" / f"{name}.parquet")

    def known(self) -> dict[int, Logprobs]:
        """Row number -> log-probabilities, of the rows that were computed before."""
        if not self.path.exists():
            return {}
        table = pq.read_table(self.path)
        pairs = zip(table["chosen"].to_pylist(), table["rejected"].to_pylist(), strict=True)
        return {row: pair for row, pair in enumerate(pairs) if not math.isnan(pair[0])}

    def add(self, computed: Mapping[int, Logprobs], num_rows: int) -> None:
        """Keep more rows; written whole, then renamed."""
        rows = {**self.known(), **computed}
        columns = list(zip(*(rows.get(row, (math.nan, math.nan)) for row in range(num_rows)), strict=True))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        pq.write_table(pa.table({"chosen": _floats(columns[0]), "rejected": _floats(columns[1])}), unfinished)
        unfinished.replace(self.path)


def _floats(values: Sequence[float]) -> pa.Array:
    return pa.array(values, type=pa.float32())
