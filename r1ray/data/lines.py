"""UTF-8 text by the line, never more of it in memory than one row may have. Knows no row format.

What is not UTF-8 is an error that names the likely encoding and the command that converts it.
"""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from r1ray.errors import WrongEncoding

__all__ = ["BOM", "LONGEST_ROW_BYTES", "MIB", "TOO_LONG", "convert", "decode", "text_lines", "wrong_encoding"]

BOM = b"\xef\xbb\xbf"
MIB = 1024 * 1024
LONGEST_ROW_BYTES = 64 * MIB
TOO_LONG = f"more than {LONGEST_ROW_BYTES // MIB} MiB"
_GUESS_BYTES = 8 * MIB


def text_lines(file: BinaryIO, path: Path, *, first: int = 1, end: int | None = None) -> Iterator[tuple[int, str | None]]:
    """(number, text) of every line from where the file stands; None for a line over the limit, which is skipped piece by piece.

    Args:
        first: The number of the first of them.
        end: Lines that begin at this byte or later are left; None: none are.

    Raises:
        WrongEncoding: a line is not UTF-8.
    """
    number = first - 1
    while (end is None or file.tell() < end) and (line := file.readline(LONGEST_ROW_BYTES)):
        number += 1
        if len(line) == LONGEST_ROW_BYTES and not line.endswith(b"\n"):
            del line
            _skip_line(file)
            yield number, None
        else:
            yield number, decode(line.removeprefix(BOM) if number == 1 else line, path, number)


def decode(data: bytes, path: Path, row: int | None = None) -> str:
    """`data` as text; `row` is the line it came from, for the error."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {row}" if row is not None else f"byte {error.start}"
        raise wrong_encoding(path, data[error.start], where) from error


def wrong_encoding(path: Path, byte: int, where: str) -> WrongEncoding:
    """The error for a byte that is not UTF-8, with what the file seems to be instead."""
    guess = _guess(path)
    advice = convert(path, "GB18030") if guess else "Export it as UTF-8."
    kind = f"it reads as {guess}" if guess else "its encoding is unknown"
    return WrongEncoding(f"{path} is not UTF-8 (byte 0x{byte:02x} in {where}); {kind}. {advice}")


def convert(path: Path, encoding: str) -> str:
    """The command that makes UTF-8 of it, to be pasted. GB18030 holds all of GBK."""
    return f"Convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(path.name)} > {shlex.quote(f'utf8-{path.name}')}"


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(MIB)) and not rest.endswith(b"\n"):
        pass


def _guess(path: Path) -> str | None:
    """GBK when the file's beginning decodes as it and shows Chinese characters; a Latin-1 file decodes as GBK by chance only."""
    with path.open("rb") as file:
        head = file.read(_GUESS_BYTES)
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head)  # a character cut at the end is no error
    except UnicodeDecodeError:
        return None
    wide = [c for c in text if ord(c) > 127]
    chinese = sum("\u4e00" <= c <= "\u9fff" or c in "，。？！：；“”、（）" for c in wide)
    return "GBK" if wide and chinese >= 0.9 * len(wide) else None
