"""One document of any supported kind to Markdown; what it is comes from its first bytes, then its name. Writes nothing.

PDF through pypdfium2 (`pdf`), Word through mammoth and HTML through markdownify (`markup`); Markdown and text are taken as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1ray.data.lines import BOM, MIB, decode
from r1ray.data.mangled import Mangled, mangled
from r1ray.data.parse.markdown import count_tables, headings
from r1ray.errors import NothingToTrain, UnknownFormat

__all__ = ["SUFFIXES", "ParsedDocument", "documents_below", "other_files", "parse"]

SUFFIXES = (".pdf", ".docx", ".html", ".htm", ".md", ".markdown", ".txt")
_REFUSED = (".doc",)
_LARGEST_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedDocument:
    """`title` is the first heading of the highest level, or empty."""

    markdown: str
    title: str
    num_headings: int
    num_tables: int
    mangled: Mangled


def documents_below(directory: Path) -> list[Path]:
    """Files that look like documents, in the order of names; old Word files too, so that each is refused by name."""
    return sorted(path for path in _files(directory) if path.suffix.lower() in (*SUFFIXES, *_REFUSED))


def other_files(directory: Path) -> Counter[str]:
    """Extension -> how many files below a directory are no documents."""
    return Counter(path.suffix.lower() or path.name for path in _files(directory) if path.suffix.lower() not in (*SUFFIXES, *_REFUSED))


def parse(path: Path) -> ParsedDocument:
    """The document as Markdown, with its headings and tables.

    Raises:
        UnknownFormat: broken, encrypted, too large, or no document at all.
        WrongEncoding: a text that is not UTF-8.
        NothingToTrain: it holds no text, as a scan does.
    """
    size = path.stat().st_size
    if size > _LARGEST_BYTES:
        raise UnknownFormat(f"{path} has {size / MIB:.0f} MiB, more than the {_LARGEST_BYTES // MIB} that are read. Split it.")
    text = _markdown(path).replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise NothingToTrain(f"{path} holds no text. If it is a scan, run character recognition on it first.")
    found = headings(text)
    title = min(found, key=lambda heading: heading[0])[1] if found else ""
    return ParsedDocument(markdown=text + "\n", title=title, num_headings=len(found), num_tables=count_tables(text), mangled=mangled(text))


def _files(directory: Path) -> Iterator[Path]:
    """Without hidden ones and the lock files that Word leaves beside what it has open."""
    return (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith((".", "~$")))


def _markdown(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(1024)
    if head.lstrip().startswith(b"%PDF"):
        from r1ray.data.parse.pdf import pdf_to_markdown

        return pdf_to_markdown(path)
    if head.startswith(b"PK"):
        from r1ray.data.parse.markup import word_to_markdown

        return word_to_markdown(path)
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise UnknownFormat(f"{path} is a Word file of before 2007. Save it as .docx.")
    if path.suffix.lower() in (".html", ".htm") or b"<html" in head.lower() or b"<!doctype html" in head.lower():
        from r1ray.data.parse.markup import html_to_markdown

        return html_to_markdown(path)
    if path.suffix.lower() in (".md", ".markdown", ".txt"):
        return decode(path.read_bytes().removeprefix(BOM), path)
    raise UnknownFormat(f"{path} is no PDF, Word, HTML, Markdown or text file. Its extension says {path.suffix or 'nothing'}.")
