"""Documents to Markdown files, and their sections to questions and answers. Knows no parser: these are in `parse`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1ray.data.parse.document import SUFFIXES, ParsedDocument, documents_below, other_files, parse
from r1ray.data.parse.markdown import sections
from r1ray.data.prepare.config import DocumentsConfig
from r1ray.data.prepare.rows import Ledger, RejectedRow
from r1ray.data.records import RawRow, ReadRow
from r1ray.data.schema import content_id
from r1ray.errors import DataError, InvalidValue, NothingToTrain
from r1ray.model.prompts import detect_language
from r1ray.settings import Settings
from r1ray.types import Conversation, Message

__all__ = ["Documents", "parse_documents", "section_rows"]

_QUESTIONS = {"zh": "请介绍《{title}》中“{heading}”的内容。", "en": "What does {title} say about {heading}?"}
_SHORTEST_SECTION = 20  # characters


@dataclass(slots=True)
class Documents:
    """What was parsed: where each file is, and counts for the report."""

    parsed: list[tuple[Path, ParsedDocument]] = field(default_factory=list)
    num_rejected: int = 0

    def summary(self) -> dict[str, Any]:
        if not self.parsed and not self.num_rejected:
            return {}
        found = [document for _, document in self.parsed]
        return {
            "parsed": len(found),
            "rejected": self.num_rejected,
            "headings": sum(document.num_headings for document in found),
            "tables": sum(document.num_tables for document in found),
            "mangled": {str(path): str(document.mangled) for path, document in self.parsed if document.mangled.share},
        }


def parse_documents(config: DocumentsConfig, out: Path, ledger: Ledger, settings: Settings) -> Documents:
    """Every document below `config.sources` as a Markdown file in `out`; one that cannot be read, or is mangled, goes into the ledger."""
    documents = Documents()
    for source in config.sources:
        root = settings.locate(source)
        for path in _files(root):
            problem = _parse_one(path, root, out, config.max_garbage_share, documents)
            if problem is not None:
                documents.num_rejected += 1
                ledger.report(RejectedRow(file=str(path), row=0, step="parse", reason=problem))
    return documents


def section_rows(documents: Documents) -> Iterator[ReadRow]:
    """Each section with text as a question about its heading and the section as the answer."""
    for path, document in documents.parsed:
        for number, (headings, text) in enumerate(sections(document.markdown), start=1):
            if len(text) < _SHORTEST_SECTION:
                continue
            title = document.title or path.stem
            heading = " > ".join(part for part in headings if part != title) or title
            question = _QUESTIONS[detect_language(text)].format(title=title, heading=heading)
            messages = (Message(role="user", content=question), Message(role="assistant", content=text))
            raw = RawRow(file=str(path), row=number, values={})
            name = f"{path.stem}-{content_id(messages)}"
            yield ReadRow(raw=raw, conversation=Conversation(id=name, messages=messages, source=f"{path}:{number}"))


def _parse_one(path: Path, root: Path, out: Path, limit: float, documents: Documents) -> str | None:
    try:
        document = parse(path)
    except DataError as error:
        return str(error)
    if document.mangled.share > limit:
        return f"{document.mangled}, more than {limit:.1%}"
    name = path.relative_to(root) if path != root else Path(path.name)
    target = out / name.with_name(f"{name.name}.md" if name.suffix.lower() != ".md" else name.name)
    if target.exists():  # another source has a file of this name
        target = _free(out / root.name / target.relative_to(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(document.markdown, encoding="utf-8")
    documents.parsed.append((path, document))
    return None


def _free(path: Path) -> Path:
    """`path`, or its first free number `name-2.md`."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InvalidValue(f"No documents at {root}. Set documents.sources to existing files or directories.")
    found = documents_below(root)
    if others := other_files(root):
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
        print(f"{root}: left out {others.total()} files that are no documents: {kinds}", flush=True)
    if not found:
        raise NothingToTrain(f"{root} holds no {', '.join(SUFFIXES)} file. Set documents.sources to where the documents are.")
    return found
