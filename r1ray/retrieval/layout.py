"""How a collection lies on disk, and the one step that makes a build visible.

    <collection>/manifest.json      which build is current, what it holds; replaced atomically, so a killed build changes nothing
    <collection>/<build>/lance/     LanceDB table `chunks`: id, text, heading, source, sha256, vector
    <collection>/<build>/bm25/      the word index; document number = row of the table

The build before the current one is kept, because a replica may still be reading it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from r1ray.errors import CollectionNotFound, RetrievalError

__all__ = ["BM25", "LANCE", "MANIFEST", "TABLE", "IndexManifest", "collections", "publish", "read_manifest", "staging"]

MANIFEST = "manifest.json"
LANCE = "lance"
BM25 = "bm25"
TABLE = "chunks"
_STAGED = ".building-"


class IndexManifest(BaseModel):
    """What the current build holds and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    collection: str = Field(description="Name of the collection.")
    build: str = Field(description="Directory of the current build, beside this file.")
    previous: str | None = Field(default=None, description="The build before it, still on disk for replicas that read it.")
    embedding: str | None = Field(description="Full name of the embedding model; None for BM25 only.")
    dimension: int = Field(ge=0, description="Numbers per vector; 0 without vectors.")
    content_sha256: str = Field(description="Hash over ids and texts of all passages and the embedding's name.")
    num_documents: int = Field(ge=1, description="Files indexed.")
    num_chunks: int = Field(ge=1, description="Passages indexed.")
    created_at: str = Field(description="UTC time, ISO 8601.")


def collections(indexes: Path) -> list[str]:
    """Names of the complete collections below `indexes`."""
    return sorted(path.parent.name for path in indexes.glob(f"*/{MANIFEST}"))


def read_manifest(collection: Path) -> IndexManifest:
    """The current manifest of a collection's directory.

    Raises:
        CollectionNotFound: there is none; names the collections that exist beside it.
        RetrievalError: the manifest is damaged or its build is gone.
    """
    path = collection / MANIFEST
    try:
        manifest = IndexManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(collections(collection.parent)) or "none yet"
        raise CollectionNotFound(
            f"No collection {collection.name!r} in {collection.parent} (there: {known}). "
            f"Build it with jobs/index_corpus.py collection={collection.name}."
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise RetrievalError(f"{path} is damaged. Build the index again with jobs/index_corpus.py collection={collection.name}.") from error
    if not (collection / manifest.build).is_dir():
        raise RetrievalError(f"Build {manifest.build!r} of {path} is gone. Run jobs/index_corpus.py collection={collection.name} again.")
    return manifest


@contextmanager
def staging(collection: Path) -> Iterator[Path]:
    """An empty hidden directory in the collection for one build; gone afterwards unless it was published.

    Raises:
        RetrievalError: another process is building the same collection.
    """
    collection.mkdir(parents=True, exist_ok=True)
    with (collection / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RetrievalError(f"Another job is building {collection.name!r}. Wait until it ends.") from error
        for stale in collection.glob(f"{_STAGED}*"):
            shutil.rmtree(stale)
        staged = collection / f"{_STAGED}{uuid.uuid4().hex[:8]}"
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def publish(collection: Path, staged: Path, manifest: IndexManifest) -> None:
    """Make `staged` the current build: rename, replace the manifest, then remove what is older than the previous build."""
    staged.replace(collection / manifest.build)
    text = collection / f".{MANIFEST}.tmp"
    with text.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    text.replace(collection / MANIFEST)
    keep = {manifest.build, manifest.previous}
    for directory in collection.iterdir():
        if directory.is_dir() and directory.name.startswith("build-") and directory.name not in keep:
            shutil.rmtree(directory)
