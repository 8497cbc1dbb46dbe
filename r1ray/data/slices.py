"""A set of files cut into slices that can be read apart, each row with the place that it has in its whole file.

    survey(DataConfig(path="corpus/*.jsonl"))  ->  Survey(digest, slices)

JSON Lines are cut at line ends, Parquet between row groups; CSV and JSON arrays are read from their beginning and stay whole. Surveying
reads every byte once, to name the content, and keeps none. Knows no dialogue and no cluster.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.data.config import DataConfig
from r1ray.data.files import Kind, kind_of, line_rows, parquet_rows, rows_of
from r1ray.data.lines import MIB
from r1ray.data.reading import Opening, T, files_of, opened, tell_format
from r1ray.data.records import RawRow
from r1ray.errors import UnknownFormat

__all__ = ["SLICE_BYTES", "Slice", "Survey", "survey"]

SLICE_BYTES = 8 * MIB
_PIECE_BYTES = MIB
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Part of a file. `start` and `end` are bytes of JSON Lines and row groups of Parquet; any other file is one slice."""

    path: Path
    kind: Kind
    columns: tuple[str, ...]
    """Of the file's first rows, which decide its format."""
    num_bytes: int
    first: int = 1
    """Number of its first row, or line, in the file."""
    start: int = 0
    end: int | None = None

    def rows(self) -> Iterator[RawRow]:
        """As `files.rows_of` gives them, of this part alone."""
        if self.kind == "lines":
            return line_rows(self.path, first=self.first, start=self.start, end=self.end)
        if self.kind == "parquet" and self.end is not None:
            return parquet_rows(self.path, first=self.first, groups=range(self.start, self.end))
        return rows_of(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All slices in order. `digest` is over the files' bytes and names below `data.path`: where they lie does not matter."""

    digest: str
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.slices)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place where a slice may begin: byte or row group, and number of the row there."""

    at: int
    row: int


def survey(config: DataConfig, opening: Opening[T], slice_bytes: int = SLICE_BYTES) -> Survey:
    """The slices of `config.path`; each file's format is checked by `opening`.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
    """
    files = files_of(config)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(partial(_surveyed, config=config, opening=opening, slice_bytes=slice_bytes), files))
    root = os.path.commonpath([path.parent for path in files])
    names = "\n".join(f"{digest} {os.path.relpath(path, root)}" for path, (digest, _) in zip(files, found, strict=True))
    slices = tuple(piece for _, pieces in found for piece in pieces)
    _log.info("%d files, %.1f MiB, in %d slices", len(files), sum(piece.num_bytes for piece in slices) / MIB, len(slices))
    return Survey(digest=hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(), slices=slices)


def _surveyed(path: Path, config: DataConfig, opening: Opening[T], slice_bytes: int) -> tuple[str, list[Slice]]:
    """(sha256 of the bytes, slices) of one file."""
    kind = kind_of(path)
    columns, _ = opened(path)
    name, _ = opening(columns, config, str(path))
    tell_format(path, name, columns, config)
    size = path.stat().st_size
    digest, ends = _read_through(path, slice_bytes if kind == "lines" else size + 1)
    cuts = _row_groups(path, slice_bytes) if kind == "parquet" else ends
    whole = Slice(path=path, kind=kind, columns=tuple(columns), num_bytes=size)
    if len(cuts) < 3:
        return digest, [whole]
    each = size // (len(cuts) - 1)
    return digest, [
        replace(whole, num_bytes=b.at - a.at if kind == "lines" else each, first=a.row, start=a.at, end=b.at) for a, b in pairwise(cuts)
    ]


def _read_through(path: Path, slice_bytes: int) -> tuple[str, list[_Cut]]:
    """(sha256 of the bytes, cuts at line ends about `slice_bytes` apart, the beginning and the end among them)."""
    digest, cuts = hashlib.sha256(), [_Cut(0, 1)]
    position = num_lines = 0
    with path.open("rb") as file:
        while piece := file.read(min(_PIECE_BYTES, slice_bytes)):
            digest.update(piece)
            end = piece.rfind(b"\n") + 1 if position + len(piece) - cuts[-1].at >= slice_bytes else 0
            if end:
                cuts.append(_Cut(position + end, num_lines + piece.count(b"\n", 0, end) + 1))
            num_lines += piece.count(b"\n")
            position += len(piece)
    if position > cuts[-1].at:
        cuts.append(_Cut(position, num_lines + 1))
    return digest.hexdigest(), cuts


def _row_groups(path: Path, slice_bytes: int) -> list[_Cut]:
    """Between row groups, of about `slice_bytes` before compression."""
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UnknownFormat(f"{path} is a broken Parquet file: {error}. Write it again.") from error
    cuts, row, size = [_Cut(0, 1)], 1, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        row, size = row + group.num_rows, size + group.total_byte_size
        if size >= slice_bytes or number == metadata.num_row_groups - 1:
            cuts.append(_Cut(number + 1, row))
            size = 0
    return cuts
