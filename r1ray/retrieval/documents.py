"""Files in, texts out: finds the sources and reads them. Knows nothing of chunks.

A file that cannot be read is a `Reject` with its reason, never silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1ray.errors import RetrievalError

__all__ = ["SUFFIXES", "Document", "Reject", "find", "read"]

SUFFIXES = (".md", ".markdown", ".txt")
_MAGIC = "*?["


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


def find(sources: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) of every document, each file once, in the order of names.

    Raises:
        RetrievalError: a source matches nothing, or two files would have the same name.
    """
    roots: dict[Path, Path] = {}
    for source in sources:
        for root, path in _expand(source):
            roots.setdefault(path, root)
    short = {path: path.relative_to(root).as_posix() for path, root in roots.items()}
    times = Counter(short.values())
    names = {path: name if times[name] == 1 else f"{roots[path].name}/{name}" for path, name in short.items()}
    _refuse_collisions(names)
    return sorted((name, path) for path, name in names.items())


def read(files: Sequence[tuple[str, Path]], encoding: str = "utf-8") -> tuple[list[Document], list[Reject]]:
    """The texts, and the files that could not be read with the reason."""
    documents: list[Document] = []
    rejects: list[Reject] = []
    for name, path in files:
        try:
            text = path.read_bytes().decode("utf-8-sig" if encoding.lower() in {"utf-8", "utf8"} else encoding)
        except UnicodeDecodeError as error:
            rejects.append(Reject(str(path), f"not {encoding} at byte {error.start}; convert it or set encoding="))
        except LookupError as error:
            raise RetrievalError(f"Unknown encoding {encoding!r}. Set encoding to utf-8 or e.g. gb18030.") from error
        except OSError as error:
            rejects.append(Reject(str(path), error.strerror or str(error)))
        else:
            documents.append(Document(name, text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")))
    return documents, rejects


def _expand(source: str) -> list[tuple[Path, Path]]:
    """(root, file) pairs of one source; the root is what names are relative to."""
    path = Path(source).expanduser()
    if path.is_file():
        pairs = [(path.parent, path)]
    elif path.is_dir():
        pairs = [(path, file) for file in _documents(path.rglob("*"))]
    else:
        root, pattern = _pattern(path)
        pairs = [(root, file) for file in _documents(root.glob(pattern) if pattern else [])]
    if not pairs:
        raise RetrievalError(f"Source {source!r} holds no {', '.join(SUFFIXES)} file. Give a file, directory or glob with some.")
    return [(root.resolve(), root.resolve() / file.relative_to(root)) for root, file in pairs]


def _documents(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file())


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
