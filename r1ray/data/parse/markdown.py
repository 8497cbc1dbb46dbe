"""What Markdown is made of: headings, tables, sections. Code blocks hold none of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

__all__ = ["count_tables", "headings", "sections", "table"]

_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")
_RULE = re.compile(r"\s*\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)+\|?\s*$")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


def headings(text: str) -> list[tuple[int, str]]:
    """(level, words) in order."""
    return [(len(found[1]), found[2]) for line, found in _lines(text) if found]


def count_tables(text: str) -> int:
    """Tables by their rule line."""
    return sum(1 for line, _ in _lines(text) if "|" in line and _RULE.match(line))


def sections(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(headings from the outermost in, body) of every section; the text before the first heading has none."""
    path: list[tuple[int, str]] = []
    body: list[str] = []
    for line, found in _lines(text):
        if found is None:
            body.append(line)
            continue
        if "".join(body).strip():
            yield tuple(words for _, words in path), "\n".join(body).strip()
        body = []
        path = [*((level, words) for level, words in path if level < len(found[1])), (len(found[1]), found[2])]
    if "".join(body).strip():
        yield tuple(words for _, words in path), "\n".join(body).strip()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    width = max(len(row) for row in rows)
    lines = ["| " + " | ".join(_cell(cell) for cell in [*row, *[""] * (width - len(row))]) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * width, *lines[1:]])


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", " ")


def _lines(text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Every line, with its heading where it is one."""
    fence: str | None = None
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = None
        yield line, _HEADING.match(line) if fence is None and not mark else None
