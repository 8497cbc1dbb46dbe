"""One JSON array as a stream of its elements: a file of any size passes through a buffer of a few rows. Knows no row format."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from r1ray.data.lines import BOM, LONGEST_ROW_BYTES, MIB, TOO_LONG, wrong_encoding
from r1ray.data.records import RawRow, raw_row
from r1ray.errors import UnknownFormat

__all__ = ["MEND", "array_rows"]

MEND = "Mend it, or export JSON Lines, where one bad row costs one."
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def array_rows(path: Path) -> Iterator[RawRow]:
    """Every element of the array that the file is, counted from 1.

    Raises:
        UnknownFormat: it is no complete JSON array, or one element is over the limit.
        WrongEncoding: it is not UTF-8.
    """
    with path.open("rb") as file:
        text = _Buffer(file, path)
        text.take("[")
        position = 0
        if text.next() == "]":
            text.take("]")
        else:
            while True:
                position += 1
                yield raw_row(path, position, text.value())
                if text.take(",]") == "]":
                    break
        if rest := text.next():
            raise UnknownFormat(f"{path} is no complete JSON: {rest!r} stands after the array. {MEND}")


class _Buffer:
    """The part of the file that is being parsed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(self._num_bytes)
        self._text = ""
        self._at = 0
        self._ended = False

    def next(self) -> str:
        """The next character that is not blank, not taken; empty at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing at least
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(MIB)

    def take(self, wanted: str) -> str:
        found = self.next()
        if not found or found not in wanted:
            shown = repr(found) if found else "the end"
            raise UnknownFormat(f"{self._path} is no complete JSON: {shown} where one of {wanted!r} is due. {MEND}")
        self._at += 1
        return found

    def value(self) -> object:
        """The next value; reads on, twice as much each time, while it is incomplete."""
        self.next()
        size = MIB
        while True:
            problem = ""
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                problem = str(error)
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            if self._ended:
                raise UnknownFormat(f"{self._path} is no complete JSON: {problem}. {MEND}")
            if len(self._text) - self._at > LONGEST_ROW_BYTES:
                raise UnknownFormat(f"{self._path} holds a row of {TOO_LONG}, or is no JSON there: {problem}. {MEND}")
            self._more(size)
            size *= 2

    def _more(self, num_bytes: int) -> None:
        data = self._file.read(num_bytes)
        self._ended = not data
        pending = len(self._decoder.getstate()[0])
        try:
            fresh = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            where = f"byte {self._num_bytes - pending + error.start}"
            raise wrong_encoding(self._path, error.object[error.start], where) from error
        self._num_bytes += len(data)
        self._text = self._text[self._at :] + fresh
        self._at = 0
