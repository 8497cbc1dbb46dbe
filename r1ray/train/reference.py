"""The base's log-probability of every answer, which DPO measures from: computed once, kept beside the tokens.

The directory is named by the token set, the base's weights and the number type; a run that needs only some rows adds a file of those.
Knows no model: who computes a row is told by the trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.train.order import WorkOrder
from r1ray.train.pairs import PairSet

__all__ = ["Logprobs", "Reference"]

Logprobs = tuple[float, float]
"""Of the better and the worse answer, summed over their tokens."""
_SCHEMA = pa.schema([("row", pa.int64()), ("chosen", pa.float32()), ("rejected", pa.float32())])


@dataclass(frozen=True, slots=True)
class Reference:
    """Parquet files of columns `row`, `chosen` and `rejected`; rows to train on count from 0, then the held-out ones."""

    path: Path

    @classmethod
    def of(cls, order: WorkOrder) -> Reference:
        assert isinstance(order.material, PairSet), "the rows have two answers each"
        parts = [order.material.path.stem, order.base.manifest.weights_sha256, order.dtype]
        return cls(order.settings.cache / "reference" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24])

    def known(self) -> dict[int, Logprobs]:
        """Row number -> log-probabilities, of the rows that were computed before."""
        found: dict[int, Logprobs] = {}
        for file in sorted(self.path.glob("*.parquet")):
            table = pq.read_table(file)
            columns = (table[name].to_pylist() for name in _SCHEMA.names)
            found |= {row: (chosen, rejected) for row, chosen, rejected in zip(*columns, strict=True)}
        return found

    def add(self, computed: Mapping[int, Logprobs]) -> None:
        """Keep more rows, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        rows = [{"row": row, "chosen": chosen, "rejected": rejected} for row, (chosen, rejected) in sorted(computed.items())]
        name = f"{time.time_ns()}.parquet"  # another job may add to the same rows
        unfinished = self.path / f".{name}.{os.getpid()}"
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), unfinished)
        unfinished.replace(self.path / name)
