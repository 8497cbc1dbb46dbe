"""JSON, JSON Lines, CSV and Parquet files as a stream of raw rows. Knows no dialogue format.

What a file is comes from its first bytes, the name only decides between CSV and nothing: exports are often misnamed.
A row that its file breaks (half a JSON line, a field too many) is a RawRow with a `problem`, so that no row is lost; a file that
cannot be read at all raises.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.data.arrays import MEND, array_rows
from r1ray.data.lines import BOM, LONGEST_ROW_BYTES, MIB, TOO_LONG, convert, decode, text_lines
from r1ray.data.records import RawRow, raw_row
from r1ray.errors import InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding

__all__ = ["Kind", "data_files", "kind_of", "line_rows", "parquet_rows", "rows_of"]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_HEAD_BYTES = 4096
_BATCH_ROWS = 1024
_LARGEST_TREE_BYTES = 1024 * MIB  # a JSON object that holds all rows has to be read whole

csv.field_size_limit(LONGEST_ROW_BYTES)  # a dialogue pasted into one cell may exceed the default 128 KiB

Kind = Literal["parquet", "array", "lines", "tree", "table"]


def data_files(path: Path) -> list[Path]:
    """`path` itself, or the data files below it in name order.

    Raises:
        InvalidValue: nothing is there.
        NothingToTrain: a directory without any data file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidValue(f"No data at {path}. Set data.path to an existing file or directory.")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    if not found:
        raise NothingToTrain(f"{path} holds no {', '.join(_SUFFIXES)} file. Set data.path to where the data is.")
    return found


def rows_of(path: Path) -> Iterator[RawRow]:
    """Every row of one file, in order; JSON Lines, CSV and Parquet are streamed.

    Raises:
        NothingToTrain: the file is empty.
        UnknownFormat: neither content nor name says what it is, or it is broken as a whole.
        WrongEncoding: text that is not UTF-8.
    """
    readers = {"parquet": parquet_rows, "array": array_rows, "lines": line_rows, "tree": _tree, "table": _table}
    return readers[kind_of(path)](path)


def kind_of(path: Path) -> Kind:
    """What the file is.

    Raises:
        NothingToTrain, UnknownFormat: the file is empty, or neither content nor name says what it is.
        WrongEncoding: UTF-16.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.removeprefix(BOM).strip():
        raise NothingToTrain(f"{path} is empty. Set data.path to a file with at least one dialogue.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise WrongEncoding(f"{path} is UTF-16, not UTF-8. {convert(path, 'UTF-16')}")
    start = head.removeprefix(BOM).lstrip()[:1]
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UnknownFormat(f"{path} is an Excel workbook or an archive. Save its sheet as 'CSV UTF-8', or unpack it, and give that file.")
    if head.startswith(b"PAR1"):
        return "parquet"
    if start == b"[":
        return "array"
    if start == b"{":
        return "lines" if _holds_lines(path) else "tree"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "lines"
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return "table"
    raise UnknownFormat(f"{path} is no JSON, JSON Lines, CSV or Parquet. Convert it to one of them, or correct its extension.")


def _holds_lines(path: Path) -> bool:
    """A file of objects is JSON Lines unless its first object spans several lines or stands alone in a .json file."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    with path.open("rb") as file:
        lines = (line for _, line in text_lines(file, path) if line is None or line.strip())
        try:
            json.loads(next(lines) or "")
        except ValueError:
            return False
        return next(lines, None) is not None


def line_rows(path: Path, *, first: int = 1, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
    """The rows of JSON Lines that begin in bytes `start` to `end`, where the line at `start` is number `first`."""
    with path.open("rb") as file:
        file.seek(start)
        for number, line in text_lines(file, path, first=first, end=end):
            if line is None:
                yield RawRow(file=str(path), row=number, values={}, problem=f"a line of {TOO_LONG}")
                continue
            if not line.strip():
                continue
            try:
                yield raw_row(path, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RawRow(file=str(path), row=number, values={}, problem=f"no JSON: {error}")


def _tree(path: Path) -> Iterator[RawRow]:
    """A single object, or the list in its `data`: read whole."""
    size = path.stat().st_size
    if size > _LARGEST_TREE_BYTES:
        raise UnknownFormat(
            f"{path} is one JSON object of {size / MIB:.0f} MiB, over the {_LARGEST_TREE_BYTES // MIB} MiB that are read whole. "
            "Export JSON Lines or an array of rows, which are streamed."
        )
    try:
        tree = json.loads(decode(path.read_bytes().removeprefix(BOM), path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnknownFormat(f"{path} is no complete JSON: {error}. {MEND}") from error
    rows = tree["data"] if isinstance(tree, dict) and isinstance(tree.get("data"), list) else [tree]
    for position, value in enumerate(rows, start=1):
        yield raw_row(path, position, value)


def _table(path: Path) -> Iterator[RawRow]:
    """CSV rows; the header is spreadsheet row 1. Blank rows are skipped as spreadsheets do."""
    with path.open("rb") as file:
        lines = _Counted(text_lines(file, path), path)
        first = next(lines)
        reader = csv.reader(_chained(first, lines), delimiter=_delimiter(first), strict=True)
        header = [name.strip() for name in next(reader)]
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise UnknownFormat(f"{path} names the column {twice!r} twice. Rename one of them.")
        number = 1
        while True:
            start = lines.count + 1
            number += 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield from _broken(path, number, lines.count - start + 1, error)
                number += lines.count - start
                continue
            if any(field.strip() for field in fields):
                yield _record(path, number, header, fields)


def _broken(path: Path, number: int, num_lines: int, error: csv.Error) -> Iterator[RawRow]:
    """One problem per swallowed line: an unclosed quote eats the rows after it, and each of them is lost to the user."""
    for offset in range(max(num_lines, 1)):
        reason = f"no CSV: {error}" if offset == 0 else f"inside a quote that row {number} opens and nothing closes"
        yield RawRow(file=str(path), row=number + offset, values={}, problem=reason)


def _record(path: Path, number: int, header: list[str], fields: list[str]) -> RawRow:
    if len(fields) != len(header):
        problem = f"{len(fields)} fields where the header has {len(header)}; quote a field that holds the delimiter"
        return RawRow(file=str(path), row=number, values={}, problem=problem)
    return RawRow(file=str(path), row=number, values=dict(zip(header, fields, strict=True)))


def parquet_rows(path: Path, *, first: int = 1, groups: Sequence[int] | None = None) -> Iterator[RawRow]:
    """The rows of a Parquet file, or of some of its row groups, of which the first row is number `first`."""
    try:
        source = pq.ParquetFile(path)
        position = first - 1
        for batch in source.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
            for values in batch.to_pylist():
                position += 1
                yield RawRow(file=str(path), row=position, values=values)
    except (pa.ArrowException, OSError) as error:
        raise UnknownFormat(f"{path} is a broken Parquet file: {error}. Write it again.") from error


class _Counted(Iterator[str]):
    """Lines with their count so far: a csv reader's own count restarts nowhere but is wrong after an error."""

    def __init__(self, numbered: Iterator[tuple[int, str | None]], path: Path) -> None:
        self._numbered = numbered
        self._path = path
        self.count = 0

    def __next__(self) -> str:
        self.count, line = next(self._numbered)
        if line is None:  # nothing says where the next row begins
            raise UnknownFormat(f"{self._path}: line {self.count} has {TOO_LONG}. Is a quote or a line break missing there?")
        return line


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    """The candidate that the header line holds most often; a comma when none occurs (one column)."""
    return max(",\t;", key=lambda candidate: (header.count(candidate), candidate == ","))
