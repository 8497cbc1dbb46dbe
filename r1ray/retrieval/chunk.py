"""A document in, its passages out: one per section, long sections split; code fences and tables are never cut.

    Headings give the path (`Cards > Lost card`) and the id (`bank/cards.md#lost-card`, the anchor that GitHub would make).
    A piece beyond the first of a section has its ordinal: `bank/cards.md#lost-card:2`.

No character of a section's body is lost: the pieces joined give the body again, apart from white space at the cuts.
Knows neither files nor embeddings.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from r1ray.retrieval.config import ChunkConfig
from r1ray.retrieval.documents import Document

__all__ = ["Chunk", "chunk_document", "slug"]

_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r"^ {0,3}(=+|-{2,})[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.DOTALL)
# A sentence ends after a Chinese full stop (and its closing quotes), after a Western one before white space, and at a line's end.
_STOP, _CLOSE = "。\uff01\uff1f\uff1b…", "”’」』\uff09"
_SENTENCE = re.compile(rf"(?<=[{_STOP}])(?![{_STOP}{_CLOSE}])|(?<=[{_STOP}][{_CLOSE}])|(?<=[.!?;]\s)|(?<=\n)")
_CLAUSE = re.compile(r"(?<=[\uff0c、\uff1a])|(?<=\s)")


@dataclass(frozen=True, slots=True)
class Chunk:
    """`heading` is the path of headings joined by ` > `, empty before the first heading."""

    id: str
    text: str
    source: str
    heading: str

    @property
    def indexed_text(self) -> str:
        """What is embedded and tokenised: the headings carry words that the body takes for granted."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.indexed_text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Section:
    path: tuple[str, ...]
    lines: tuple[str, ...]


def chunk_document(document: Document, config: ChunkConfig) -> list[Chunk]:
    """The passages of one document, in reading order. An empty document gives none."""
    chunks: list[Chunk] = []
    used: set[str] = set()
    sections = list(_sections(document.text)) if document.is_markdown else [_Section((), tuple(document.text.splitlines(True)))]
    for section, following in zip_longest(sections, sections[1:]):
        anchor = _anchor(section, used)
        bodies = _pieces(section, config) or _bare_heading(section, following)
        for ordinal, body in enumerate(bodies, start=1):
            suffix = "" if ordinal == 1 else f":{ordinal}"
            chunks.append(Chunk(f"{document.name}{anchor}{suffix}", body, document.name, " > ".join(section.path)))
    return chunks


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, letters, digits and hyphens of any script."""
    kept = (c for c in unicodedata.normalize("NFC", heading).lower() if c.isalnum() or c in "-_ ")
    return "".join(kept).strip().replace(" ", "-")


def _anchor(section: _Section, used: set[str]) -> str:
    """`#slug`, made unique in its document by `-1`, `-2`; empty for the text before the first heading."""
    if not section.path:
        return ""
    base = slug(section.path[-1]) or "section"
    name, number = base, 0
    while name in used:
        number += 1
        name = f"{base}-{number}"
    used.add(name)
    return f"#{name}"


def _bare_heading(section: _Section, following: _Section | None) -> list[str]:
    """A heading without a body is a passage of its own, unless it only introduces the headings below it."""
    introduces = following is not None and following.path[: len(section.path)] == section.path
    return [] if introduces or not section.path else [section.path[-1]]


def _sections(text: str) -> Iterator[_Section]:
    """Split Markdown at headings (# and underlined), not inside code fences; front matter is left out."""
    lines = _FRONT_MATTER.sub("", text, count=1).splitlines(True)
    stack: list[tuple[int, str]] = []
    body: list[str] = []
    fence = ""
    for line in lines:
        fence, inside = _fence_state(line, fence)
        heading = None if inside else _heading(line, body)
        if heading is None:
            body.append(line)
            continue
        level, title, consumed = heading
        body = body[: len(body) - consumed]
        if body or stack:
            yield _Section(tuple(t for _, t in stack), tuple(body))
        stack = [(lv, t) for lv, t in stack if lv < level] + [(level, title)]
        body = []
    if body or stack:
        yield _Section(tuple(t for _, t in stack), tuple(body))


def _heading(line: str, body: list[str]) -> tuple[int, str, int] | None:
    """(level, title, lines of the body that belong to the heading), or None."""
    if match := _HEADING.match(line.rstrip("\n")):
        return len(match[1]), match[2].strip(), 0
    underline = _UNDERLINE.match(line.rstrip("\n"))
    if underline and body and body[-1].strip() and not _starts_block(body[-1]) and (len(body) == 1 or not body[-2].strip()):
        return (1 if underline[1][0] == "=" else 2), body[-1].strip(), 1
    return None


def _starts_block(line: str) -> bool:
    """A line that cannot be the text of an underlined heading: table row, list item, quote, fence."""
    return bool(re.match(r"^\s*(\||[-*+>]\s|\d+[.)]\s|`{3}|~{3})", line)) or line.startswith("    ")


def _fence_state(line: str, fence: str) -> tuple[str, bool]:
    """The open fence after this line, and whether the line belongs to a fence."""
    match = _FENCE.match(line)
    if not fence:
        return (match[1], True) if match else ("", False)
    closes = match is not None and match[1][0] == fence[0] and len(match[1]) >= len(fence) and not line.strip().strip(fence[0])
    return ("" if closes else fence), True


def _pieces(section: _Section, config: ChunkConfig) -> list[str]:
    """The body in pieces of at most `max_chars`, or whole when it fits."""
    body = "".join(section.lines).strip("\n")
    if not body.strip():
        return []
    if len(body) <= config.max_chars:
        return [body.strip()]
    pieces = _pack([unit for block, whole in _blocks(body) for unit in _units(block, whole, config.max_chars)], config)
    return [piece for piece in pieces if piece]


def _blocks(body: str) -> Iterator[tuple[str, bool]]:
    """(text, must stay whole) for each fence, table and paragraph; blank lines stay with the block before them."""
    kind, fence = "", ""
    block: list[str] = []
    for line in body.splitlines(True):
        opens = not fence
        fence, inside = _fence_state(line, fence)
        new = "fence" if inside else "table" if line.lstrip().startswith("|") else "text" if line.strip() else "blank"
        if block and new != "blank" and (new != kind or (inside and opens)):
            yield "".join(block), _is_whole(block)
            block = []
        block.append(line)
        kind = new
    if block:
        yield "".join(block), _is_whole(block)


def _is_whole(block: list[str]) -> bool:
    return bool(_FENCE.match(block[0])) or block[0].lstrip().startswith("|")


def _units(block: str, whole: bool, limit: int) -> Iterator[str]:
    """The block itself if it fits or must stay whole, else its sentences, else clauses, else slices; trailing white space stays."""
    if whole or len(block.strip()) <= limit:
        yield block
        return
    for sentence in _split(_SENTENCE, block):
        if len(sentence.strip()) <= limit:
            yield sentence
            continue
        for clause in _split(_CLAUSE, sentence):
            yield from (clause[i : i + limit] for i in range(0, len(clause), limit))


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    return [part for part in pattern.split(text) if part]


def _pack(units: list[str], config: ChunkConfig) -> list[str]:
    """Fill pieces up to `max_chars` in order; a last piece below `min_chars` joins the one before it."""
    pieces: list[str] = []
    for unit in units:
        if pieces and len((pieces[-1] + unit).strip()) <= config.max_chars:
            pieces[-1] += unit
        else:
            pieces.append(unit)
    if len(pieces) > 1 and len(pieces[-1].strip()) < config.min_chars:
        pieces[-2:] = [pieces[-2] + pieces[-1]]
    return [piece.strip() for piece in pieces]
