"""Rows of a training set as one Arrow file that is mapped into memory, not loaded: ranks of a node share its pages.

Written a block of rows at a time under a hidden name and renamed when all of it is there. Knows not what the rows mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

__all__ = ["MappedRows", "mapped", "write_rows"]

Row = TypeVar("Row")
_BLOCK = 4096  # rows that are Python objects at a time


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.ipc.new_file(unfinished, schema) as writer:
            rest = iter(rows)
            while block := list(islice(rest, _BLOCK)):
                writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def mapped(path: Path) -> pa.Table:
    """Costs no memory but for the pages of what is looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class MappedRows(Sequence[Row], Generic[Row]):
    """The rows of a mapped table; each becomes an object, by `make` of its columns, when it is asked for."""

    def __init__(self, table: pa.Table, make: Callable[[dict[str, Any]], Row]) -> None:
        self._table, self._make = table, make

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | Sequence[Row]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._make(self._table.slice(row % len(self), 1).to_pylist()[0])
