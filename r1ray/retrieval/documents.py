"""Files in, texts out: finds the sources and reads them. Knows nothing of chunks.

Markdown and text are read here, PDF, Word and HTML by `r1ray.data.parse`. A file that cannot be read is a `Reject` with its reason, and
files of other types are counted: never silence.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1ray.data.lines import wrong_encoding
from r1ray.data.parse.document import other_files, parse
from r1ray.errors import DataError, RetrievalError

__all__ = ["SUFFIXES", "Document", "Reject", "find", "left_out", "read"]

_TEXT = (".md", ".markdown", ".txt")
_PARSED = (".pdf", ".docx", ".doc", ".html", ".htm")
SUFFIXES = (*_TEXT, *_PARSED)
_MAGIC = "*?["
_MAX_GARBAGE = 0.05
_PROGRESS_S = 5.0


@dataclass(frozen=True, slots=True)
class Document:
    """`name` is the path relative to its source, with forward slashes: stable when the corpus moves."""

    name: str
    text: str

    @property
    def is_markdown(self) -> bool:
        return not self.name.endswith(".txt")


@dataclass(frozen=True, slots=True)
class Reject:
    file: str
    reason: str


def find(sources: Sequence[str], home: Path | None = None) -> list[tuple[str, Path]]:
    """(name, path) of every document, each file once, in the order of names. Relative sources also count from `home`.

    Raises:
        RetrievalError: a source matches nothing, or two files would have the same name.
    """
    roots: dict[Path, Path] = {}
    for source in sources:
        for root, path in _expand(source, home):
            roots.setdefault(path, root)
    short = {path: path.relative_to(root).as_posix() for path, root in roots.items()}
    times = Counter(short.values())
    names = {path: name if times[name] == 1 else f"{roots[path].name}/{name}" for path, name in short.items()}
    _refuse_collisions(names)
    return sorted((name, path) for path, name in names.items())


def left_out(sources: Sequence[str], home: Path | None = None) -> dict[str, int]:
    """Extension -> how many files of the directories among `sources` are no documents that are read."""
    found: Counter[str] = Counter()
    for source in sources:
        if directory := next((place for place in _places(source, home) if place.is_dir()), None):
            found += other_files(directory)
    return dict(sorted(found.items()))


def read(
    files: Sequence[tuple[str, Path]], encoding: str = "utf-8", progress: Callable[[str], None] = lambda _: None
) -> tuple[list[Document], list[Reject]]:
    """The texts, and the files that could not be read with the reason. `encoding` is that of Markdown and text files.

    Raises:
        RetrievalError: there is no such encoding.
    """
    documents: list[Document] = []
    rejects: list[Reject] = []
    said = time.monotonic()
    for number, (name, path) in enumerate(files, start=1):
        try:
            text = _parsed(path) if path.suffix.lower() in _PARSED else _decoded(path, encoding)
        except DataError as error:
            rejects.append(Reject(str(path), str(error).removeprefix(f"{path} ")))
        except OSError as error:
            rejects.append(Reject(str(path), error.strerror or str(error)))
        else:
            documents.append(Document(name, text))
        if time.monotonic() - said > _PROGRESS_S:
            said = time.monotonic()
            progress(f"read {number}/{len(files)} documents")
    return documents, rejects


def _parsed(path: Path) -> str:
    document = parse(path)
    if document.mangled.share > _MAX_GARBAGE:
        raise DataError(f"{path} holds {document.mangled}, more than {_MAX_GARBAGE:.0%}")
    return document.markdown


def _decoded(path: Path, encoding: str) -> str:
    is_utf8 = encoding.lower() in {"utf-8", "utf8"}
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig" if is_utf8 else encoding)
    except UnicodeDecodeError as error:
        if is_utf8:
            raise wrong_encoding(path, data[error.start], f"byte {error.start}") from error
        raise DataError(f"{path} is not {encoding} at byte {error.start}; set encoding to what it is") from error
    except LookupError as error:
        raise RetrievalError(f"Unknown encoding {encoding!r}. Set encoding to utf-8 or e.g. gb18030.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def _places(source: str, home: Path | None) -> Iterator[Path]:
    """As given, then below home: a submitted job runs in a copy of the tree."""
    path = Path(source).expanduser()
    yield path
    if home is not None and not path.is_absolute():
        yield home / path


def _expand(source: str, home: Path | None) -> list[tuple[Path, Path]]:
    """(root, file) pairs of one source; the root is what names are relative to."""
    for path in _places(source, home):
        if pairs := _pairs(path):
            return [(root.resolve(), root.resolve() / file.relative_to(root)) for root, file in pairs]
    places = [str(place) for place in _places(source, home)]
    if not any(mark in source for mark in _MAGIC) and not any(Path(place).exists() for place in places):
        raise RetrievalError(f"Source {source!r} does not exist (looked for {', '.join(places)}). Give a file, directory or glob.")
    raise RetrievalError(f"Source {source!r} holds no {', '.join(SUFFIXES)} file. Give a file, directory or glob with some.")


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    if path.is_file():
        return [(path.parent, path)]
    if path.is_dir():
        return [(path, file) for file in _documents(path.rglob("*"))]
    root, pattern = _pattern(path)
    return [(root, file) for file in _documents(root.glob(pattern) if pattern else [])]


def _documents(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith((".", "~$")))


def _pattern(path: Path) -> tuple[Path, str]:
    """A glob as its leading directories without wildcard and the rest; no rest when there is no wildcard."""
    wild = [i for i, part in enumerate(path.parts) if any(c in part for c in _MAGIC)]
    if not wild:
        return path, ""
    return Path(*path.parts[: wild[0]]), "/".join(path.parts[wild[0] :])


def _refuse_collisions(names: dict[Path, str]) -> None:
    seen: dict[str, Path] = {}
    for path, name in names.items():
        if name in seen:
            raise RetrievalError(f"{seen[name]} and {path} would both be called {name!r}. Index their common directory as one source.")
        seen[name] = path
