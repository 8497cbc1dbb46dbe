"""PDF to Markdown from what a PDF has: characters with boxes. Headings are lines in larger type, tables are lines whose parts align.

A PDF knows neither words nor lines nor headings. Lines are pdfium's; what is larger than most of the text is a heading, and two or
more lines in a row that fall into the same columns are a table. Running heads and page numbers, the same on most pages, are left out.
Bold headings in the size of the text stay text.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1ray.data.parse.markdown import table
from r1ray.errors import UnknownFormat

__all__ = ["pdf_to_markdown"]

_HEADING_SCALE = 1.15  # of the body's type
_LONGEST_HEADING = 120
_COLUMN_GAP = 1.6  # line heights between two parts of a line
_RUNNING_SHARE = 0.4  # of the pages: left and right ones may differ
_FEWEST_PAGES = 4  # below it nothing tells a running head from text
_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
_SENTENCE_END = re.compile(r"[.!?。！？:：;；]$")


@dataclass(frozen=True, slots=True)
class _Char:
    """A character, its place in pdfium's list and its box."""

    text: str
    index: int
    left: float
    right: float
    bottom: float
    top: float


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: its parts as (left edge, text), its place on the page, its type's size."""

    parts: tuple[tuple[float, str], ...]
    top: float
    bottom: float
    right: float
    height: float

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.parts)


def pdf_to_markdown(path: Path) -> str:
    """Text, headings and tables in reading order as the file has it.

    Raises:
        UnknownFormat: encrypted or broken.
    """
    pages = _pages(path)
    body = _body_height(pages)
    levels = _levels(pages, body)
    running = _running(pages)
    blocks: list[str] = []
    for page in pages:
        lines = [line for line in page if _anonymous(line.text) not in running]
        blocks += _blocks(lines, body, levels)
    return "\n\n".join(blocks)


def _pages(path: Path) -> list[list[_Line]]:
    import pypdfium2 as pdfium

    try:
        document = pdfium.PdfDocument(path)
        try:
            return [list(_lines(page.get_textpage())) for page in document]
        finally:
            document.close()
    except pdfium.PdfiumError as error:
        advice = "Remove its password first." if "assword" in str(error) else "Print it to a new PDF."
        raise UnknownFormat(f"{path} is no readable PDF: {error}. {advice}") from error


def _lines(page: Any) -> Iterator[_Line]:
    """pdfium puts line breaks and blanks between the characters where the page has room; the boxes say how much."""
    from pypdfium2 import raw

    box, handle = raw.FS_RECTF(), page.raw
    chars: list[_Char] = []
    for index in range(page.count_chars()):
        code = raw.FPDFText_GetUnicode(handle, index)
        if code in (0x0D, 0x0A):
            yield from _line(chars, handle)
            chars = []
            continue
        if code in (0x02, 0xFFFE):  # a hyphen where pdfium has joined a word over two lines
            continue
        char = chr(code) if code and not 0xD800 <= code <= 0xDFFF else "\ufffd"
        if raw.FPDFText_GetLooseCharBox(handle, index, ctypes.byref(box)):
            chars.append(_Char(char, index, box.left, box.right, box.bottom, box.top))
        elif chars:
            chars.append(replace(chars[-1], text=char, index=index, left=chars[-1].right))
    yield from _line(chars, handle)


def _line(chars: Sequence[_Char], page: Any) -> Iterator[_Line]:
    solid = [char for char in chars if not char.text.isspace()]
    if not solid:
        return
    sampled = solid[:: max(len(solid) // 5, 1)]
    height = Counter(_size(page, char.index) for char in sampled).most_common(1)[0][0] or round(solid[0].top - solid[0].bottom, 1)
    parts: list[tuple[float, str]] = []
    text, left, right = "", solid[0].left, solid[0].left
    for char in chars:
        if char.text.isspace():
            text += " " if text and not text.endswith(" ") else ""
            continue
        if text and char.left - right > _COLUMN_GAP * max(height, 1):
            parts.append((left, text.strip()))
            text = ""
        if not text:
            left = char.left
        text += char.text
        right = char.right
    parts.append((left, text.strip()))
    yield _Line(tuple(parts), max(c.top for c in solid), min(c.bottom for c in solid), right, height)


def _size(page: Any, index: int) -> float:
    """Points on the page: some writers put the size into the font, some into the matrix. Boxes would differ from font to font."""
    from pypdfium2 import raw

    matrix = raw.FS_MATRIX()
    scale = math.hypot(matrix.c, matrix.d) if raw.FPDFText_GetMatrix(page, index, ctypes.byref(matrix)) else 1.0
    return round(float(raw.FPDFText_GetFontSize(page, index)) * scale, 1)


def _body_height(pages: Sequence[Sequence[_Line]]) -> float:
    heights: Counter[float] = Counter()
    for page in pages:
        for line in page:
            heights[line.height] += len(line.text)
    return heights.most_common(1)[0][0] if heights else 1.0


def _levels(pages: Sequence[Sequence[_Line]], body: float) -> dict[float, int]:
    """Height of type -> heading level; sizes that differ by less than 5 % are one."""
    sizes = sorted({line.height for page in pages for line in page if _is_heading(line, body)}, reverse=True)
    levels: dict[float, int] = {}
    level, last = 0, float("inf")
    for size in sizes:
        if size < 0.95 * last:
            level, last = min(level + 1, 6), size
        levels[size] = level
    return levels


def _is_heading(line: _Line, body: float) -> bool:
    text = line.text
    return line.height >= _HEADING_SCALE * body and len(text) <= _LONGEST_HEADING and any(c.isalpha() for c in text)


def _running(pages: Sequence[Sequence[_Line]]) -> set[str]:
    """First and last lines that many pages share, their numbers apart."""
    if len(pages) < _FEWEST_PAGES:
        return set()
    seen: Counter[str] = Counter()
    for page in pages:
        seen.update({_anonymous(line.text) for line in (*page[:2], *page[-2:])})
    return {text for text, number in seen.items() if number >= _RUNNING_SHARE * len(pages)}


def _anonymous(text: str) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", text.strip())


def _blocks(lines: Sequence[_Line], body: float, levels: dict[float, int]) -> list[str]:
    """Headings, tables and paragraphs of one page."""
    blocks: list[str] = []
    paragraph: list[_Line] = []
    place = 0
    while place < len(lines):
        num_rows = _table_rows(lines[place:])
        heading = _is_heading(lines[place], body)
        if paragraph and (num_rows or heading or _starts_paragraph(paragraph[-1], lines[place], lines)):
            blocks.append(_joined(paragraph))
            paragraph = []
        if num_rows:
            blocks.append(table(_aligned(lines[place : place + num_rows])))
            place += num_rows
            continue
        if heading:
            blocks.append(f"{'#' * levels[lines[place].height]} {lines[place].text}")
        else:
            paragraph.append(lines[place])
        place += 1
    return [*blocks, _joined(paragraph)] if paragraph else blocks


def _table_rows(lines: Sequence[_Line]) -> int:
    """How many lines from here on are rows of one table; 0 when the first is none."""
    first = lines[0]
    if len(first.parts) < 2:
        return 0
    edges = [left for left, _ in first.parts]
    num_rows = 1
    for before, line in pairwise(lines):
        tolerance = 1.5 * first.height
        fits = all(any(abs(left - edge) < tolerance for edge in edges) for left, _ in line.parts)
        # a single part in a later column goes on with the cell above it
        goes_on = len(line.parts) == 1 and line.parts[0][0] > edges[0] + tolerance and before.bottom - line.top < first.height
        if not fits or (len(line.parts) < 2 and not goes_on) or abs(line.height - first.height) > 0.3 * first.height:
            break
        num_rows += 1
    return num_rows if sum(len(line.parts) > 1 for line in lines[:num_rows]) > 1 else 0


def _aligned(lines: Sequence[_Line]) -> list[list[str]]:
    """Every part in the column that begins nearest; a line without a first column belongs to the row above."""
    edges = [left for left, _ in max(lines, key=lambda line: len(line.parts)).parts]
    rows: list[list[str]] = []
    for line in lines:
        row = [""] * len(edges)
        for left, text in line.parts:
            column = min(range(len(edges)), key=lambda place: abs(edges[place] - left))
            row[column] = f"{row[column]} {text}".strip()
        if rows and len(line.parts) == 1 and not row[0]:
            rows[-1] = [_continued(above, below) for above, below in zip(rows[-1], row, strict=True)]
        else:
            rows.append(row)
    return rows


def _continued(above: str, below: str) -> str:
    space = "" if not above or not below or _HAN_END.search(above) else " "
    return f"{above}{space}{below}"


def _starts_paragraph(before: _Line, line: _Line, lines: Sequence[_Line]) -> bool:
    """A gap of more than half a line, or a sentence that ended well before the right edge."""
    gap = before.bottom - line.top
    ended_early = before.right < max(other.right for other in lines) - 4 * before.height
    return gap > 0.6 * before.height or gap < -3 * before.height or (ended_early and _SENTENCE_END.search(before.text) is not None)


def _joined(lines: Sequence[_Line]) -> str:
    """Lines of a paragraph; Chinese lines join without a blank, hyphenated words without the hyphen."""
    text = lines[0].text
    for line in lines[1:]:
        if re.search(r"[a-z]-$", text) and line.text[:1].islower():
            text = text[:-1] + line.text
        else:
            text += ("" if _HAN_END.search(text) else " ") + line.text
    return f"\\{text}" if text.startswith("#") else text  # a root prompt is no heading
