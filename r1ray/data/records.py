"""What readers pass on: a raw row with its place, a rejected row with its reason, a loaded set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1ray.data.config import Format
from r1ray.types import Conversation

__all__ = ["BadRow", "Loaded", "RawRow", "ReadRow", "Reject", "SlicedRow", "raw_row"]


class BadRow(Exception):
    """A row that is no dialogue; the text is the reason. Never leaves the package: `read` turns it into a Reject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as its file holds it. `problem` is set, and `values` empty, where the file itself is broken at this row."""

    file: str
    row: int
    values: Mapping[str, Any]
    problem: str | None = None


def raw_row(path: Path, row: int, value: object) -> RawRow:
    """A parsed JSON value as a row; anything but an object is the row's problem."""
    if isinstance(value, Mapping):
        values: Mapping[str, Any] = value
        return RawRow(file=str(path), row=row, values=values)
    return RawRow(file=str(path), row=row, values={}, problem=f"a JSON {type(value).__name__}, not an object")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A row that was left out. `row` is the line of a JSON Lines file, the spreadsheet row of a CSV file (the header is 1),
    else the position counted from 1."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRow:
    """A raw row with its dialogue, or with the `reason` why it holds none."""

    raw: RawRow
    conversation: Conversation | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedRow:
    """A row that was read apart from most others of its set, which may have used its dialogue's id before it."""

    raw: RawRow
    found: Conversation | BadRow
    names_itself: bool
    """Whether the id is the row's own and so must be new; else it is made of the content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A set in memory: with no limit, `len(conversations) + len(rejects) == num_rows`."""

    conversations: tuple[Conversation, ...]
    rejects: tuple[Reject, ...]
    data_hash: str
    formats: tuple[Format, ...]
    num_rows: int
