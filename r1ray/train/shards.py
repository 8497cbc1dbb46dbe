"""Token rows on disk: Arrow files that are mapped into memory, not loaded, and a small table of what each row weighs.

    KEY/00000.arrow ...   columns `input_ids` and `mask` (1 = carries loss), uncompressed, in shards of about `SHARD_BYTES`
    KEY/rows.parquet      one row per dialogue, in the same order: `length`, `trained`, `origin`; under a mix plan `role` and `chars`, too

A rank touches the pages of the rows that it trains on; ranks of one node share them, and the kernel drops them when memory is wanted.
The directory is written under a hidden name and renamed when all of it is on the disk. Knows no tokenizer.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.errors import DiskFull
from r1ray.train.mapped import mapped

__all__ = [
    "COUNTS",
    "ORIGIN",
    "ROWS",
    "SHARD_BYTES",
    "TOKENS",
    "Column",
    "Picked",
    "ShardWriter",
    "columns",
    "counts",
    "origins",
    "replacing",
    "weights",
]

ROWS = "rows.parquet"
SHARD_BYTES = 512 * 2**20
TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("mask", pa.list_(pa.int8()))])
ORIGIN = pa.field("origin", pa.uint64())
"""`split.stem_hash` of the row's id: rows with the same one are held out together."""
COUNTS = "r1ray"
"""Key of the metadata of `ROWS`: what was counted, as JSON."""
_WEIGHTS = (pa.field("length", pa.int32()), pa.field("trained", pa.int32()))
_MIXED = (pa.field("role", pa.string()), pa.field("chars", pa.int64()))
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class ShardWriter:
    """Appends tables of rows to the shards of a directory; `close` with the counts ends it."""

    def __init__(self, directory: Path, *, is_mixed: bool, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory, self._shard_bytes, self._is_mixed = directory, shard_bytes, is_mixed
        self._rows = pq.ParquetWriter(directory / ROWS, _weights_schema(is_mixed), compression="zstd")
        self._shard: pa.RecordBatchFileWriter | None = None
        self._num_bytes = 0
        self._paths: list[Path] = []
        self.num_rows = self.num_tokens = self.num_trained_tokens = 0

    def append(self, rows: pa.Table) -> None:
        """Rows of `TOKENS` and `ORIGIN`, with `role` and `chars` where the set is mixed."""
        if not rows.num_rows:
            return
        tokens = rows.select(TOKENS.names).cast(TOKENS).combine_chunks()
        if self._shard is None or self._num_bytes + tokens.nbytes > self._shard_bytes:
            self._next_shard()
        assert self._shard is not None, "just opened"
        self._shard.write_table(tokens)
        self._num_bytes += tokens.nbytes
        weighed = _weighed(tokens)
        for field in (ORIGIN, *(_MIXED if self._is_mixed else ())):
            weighed = weighed.append_column(field, rows[field.name])
        self._rows.write_table(weighed)
        self.num_rows += tokens.num_rows
        self.num_tokens += pc.sum(weighed["length"]).as_py()
        self.num_trained_tokens += pc.sum(weighed["trained"]).as_py()

    def close(self, counted: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Write what was counted, and make sure that all of it outlives a loss of power."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        sizes = {path.name: path.stat().st_size for path in self._paths}
        own = {"rows": self.num_rows, "tokens": self.num_tokens, "trained": self.num_trained_tokens, "sizes": sizes}
        self._rows.add_key_value_metadata({COUNTS: json.dumps({**counted, **own}), **metadata})
        self._rows.close()
        for path in (*self._paths, self._directory / ROWS):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """After an error the files are only closed: they go with their directory."""
        if kind is not None:
            if self._shard is not None:
                self._shard.close()
            self._rows.close()

    def _next_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._paths.append(self._directory / f"{len(self._paths):05d}.arrow")
        self._shard = pa.ipc.new_file(self._paths[-1], TOKENS)
        self._num_bytes = 0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden directory beside `path` that takes its place when the block succeeds; what a killed process left of one is removed.

    Raises:
        DiskFull: the block ran out of room; nothing of it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_hidden(path)}{os.getpid()}."))
    unfinished.chmod(0o755)  # workers may run as somebody else
    try:
        yield unfinished
        _rename(unfinished, path)
    except OSError as error:
        if error.errno in _NO_ROOM or "No space left" in str(error):
            raise DiskFull(
                f"No room for tokens in {path.parent}: {error}. Nothing was left there. Free some, or move R1RAY_HOME."
            ) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def counts(directory: Path) -> dict[str, Any] | None:
    """What was counted when the set was written; None where there is none, or where one of its files is not what it was."""
    try:
        stored = (pq.read_metadata(directory / ROWS).metadata or {})[COUNTS.encode()]
        found: dict[str, Any] = json.loads(stored)
        whole = all((directory / name).stat().st_size == size for name, size in found["sizes"].items())
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return found if whole else None


def weights(directory: Path, name: str) -> array[int]:
    """Column `length` or `trained` of all rows, four bytes each."""
    found = array("i")
    found.frombytes(pq.read_table(directory / ROWS, columns=[name])[name].combine_chunks().to_numpy().astype(np.int32).tobytes())
    return found


def origins(directory: Path) -> npt.NDArray[np.uint64]:
    """Column `origin` of all rows, eight bytes each."""
    found: npt.NDArray[np.uint64] = pq.read_table(directory / ROWS, columns=[ORIGIN.name])[ORIGIN.name].to_numpy()
    return found


def columns(directory: Path) -> tuple[Column, Column]:
    """(input ids, masks) of the set in `directory`; costs no memory but for the pages of rows that are asked for."""
    shards = [mapped(path) for path in sorted(directory.glob("*.arrow"))]
    table = pa.concat_tables(shards) if shards else TOKENS.empty_table()
    return Column(table["input_ids"]), Column(table["mask"])


class Column(Sequence[list[int]]):
    """A column of lists that lies in mapped files: a row becomes Python numbers when it is asked for."""

    def __init__(self, mapped: pa.ChunkedArray) -> None:
        self._mapped = mapped

    def __len__(self) -> int:
        return len(self._mapped)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(row, slice):
            return Picked(self, range(*row.indices(len(self))))
        numbers: list[int] = self._mapped[row].values.to_numpy().tolist()
        return numbers


class Picked(Sequence[Any]):
    """Some rows of a column, in an order of their own; copies none."""

    def __init__(self, whole: Sequence[Any], rows: Sequence[int]) -> None:
        self._whole, self._rows = whole, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        return Picked(self._whole, self._rows[row]) if isinstance(row, slice) else self._whole[self._rows[row]]


def _weights_schema(is_mixed: bool) -> pa.Schema:
    return pa.schema([*_WEIGHTS, ORIGIN, *(_MIXED if is_mixed else ())])


def _weighed(tokens: pa.Table) -> pa.Table:
    """`length` and `trained` of each row, by sums over the whole column: a loop over lists would take longer than writing them."""
    lengths = pc.list_value_length(tokens["input_ids"]).combine_chunks()
    offsets = np.cumsum([0, *lengths.to_numpy()])
    sums = np.concatenate([[0], np.cumsum(tokens["mask"].combine_chunks().flatten().to_numpy(), dtype=np.int64)])
    return pa.table([lengths, pa.array(sums[offsets[1:]] - sums[offsets[:-1]], type=pa.int32())], schema=pa.schema(_WEIGHTS))


def _hidden(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."


def _sweep(path: Path) -> None:
    """Directories of this name whose process, on this machine, is gone."""
    for left in path.parent.glob(f"{_hidden(path)}*"):
        pid = left.name.removeprefix(_hidden(path)).split(".")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _rename(unfinished: Path, path: Path) -> None:
    try:
        unfinished.rename(path)
    except OSError:
        if not path.exists():
            raise  # else another job was faster, with the same rows
