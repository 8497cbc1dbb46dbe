"""Documents in, a searchable collection out: LanceDB for vectors and texts, BM25 beside it.

A passage whose text has not changed keeps its vector; a corpus that has not changed is not written again. The new build becomes
visible in one step (layout.py), so that readers see the old or the new one and a killed job leaves the old one.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from r1ray.errors import CollectionNotFound, RetrievalError
from r1ray.retrieval import layout
from r1ray.retrieval.chunk import Chunk, chunk_document
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.documents import Reject, find, left_out, read
from r1ray.retrieval.embed import Embedder, Vectors, create_embedder
from r1ray.retrieval.lexical import Lexical
from r1ray.settings import Settings

__all__ = ["IndexStats", "build_index"]

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """What one build did. `changed` is False when the corpus was already indexed as it is."""

    collection: str
    path: Path
    num_documents: int
    num_chunks: int
    num_embedded: int
    num_reused: int
    rejects: tuple[Reject, ...]
    seconds: float
    changed: bool


def build_index(
    config: IndexConfig, settings: Settings | None = None, *, embedder: Embedder | None = None, progress: Progress = print
) -> IndexStats:
    """Index `config.sources` as `config.collection` below `settings.indexes`.

    Raises:
        RetrievalError: nothing to index, too many unreadable files, or another job builds the same collection.
    """
    start = time.monotonic()
    settings = settings or Settings()
    collection = settings.indexes / config.collection
    found = find(config.sources, settings.home)
    if ignored := left_out(config.sources, settings.home):
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in ignored.items())
        progress(f"left out {sum(ignored.values())} files of other types: {kinds}")
    documents, rejects = read(found, config.encoding, progress)
    _check_rejects(rejects, len(found), config, progress)
    chunks = [chunk for document in documents for chunk in chunk_document(document, config.chunk)]
    if not chunks:
        raise RetrievalError(f"The {len(found)} files of {', '.join(config.sources)} hold no text. Give documents that do.")
    progress(f"read {len(documents)} documents: {len(chunks)} passages")
    embedder = None if config.embedding == "none" else embedder or create_embedder(config.embedding)
    digest = _digest(chunks, embedder)
    with layout.staging(collection) as staged:
        current = _current(collection)
        changed = current is None or current.content_sha256 != digest
        num_reused = len(chunks)
        if changed:
            known = _known_vectors(collection, current, embedder)
            num_reused = sum(chunk.sha256 in known for chunk in chunks)
            vectors = _embed(chunks, known, embedder, config.batch_size, progress) if embedder else None
            _write(staged, chunks, vectors, config.ann_above)
            layout.publish(collection, staged, _manifest(config, current, digest, embedder, (len(documents), len(chunks))))
    return IndexStats(
        collection=config.collection,
        path=collection,
        num_documents=len(documents),
        num_chunks=len(chunks),
        num_embedded=len(chunks) - num_reused if embedder else 0,
        num_reused=num_reused if embedder else 0,
        rejects=tuple(rejects),
        seconds=time.monotonic() - start,
        changed=changed,
    )


def _check_rejects(rejects: list[Reject], num_files: int, config: IndexConfig, progress: Progress) -> None:
    for reject in rejects:
        progress(f"unreadable: {reject.file}: {reject.reason}")
    if len(rejects) > config.max_bad_share * num_files:
        first = rejects[0]
        raise RetrievalError(
            f"{len(rejects)} of {num_files} files are unreadable, allowed is a share of {config.max_bad_share:g}; the first is "
            f"{first.file} ({first.reason}). Mend the files or raise max_bad_share."
        )


def _digest(chunks: Sequence[Chunk], embedder: Embedder | None) -> str:
    digest = hashlib.sha256((embedder.name if embedder else "none").encode())
    for chunk in chunks:
        digest.update(f"\0{chunk.id}\0{chunk.sha256}".encode())
    return digest.hexdigest()


def _current(collection: Path) -> layout.IndexManifest | None:
    """The manifest in force. A damaged one is no obstacle to a build, which replaces it."""
    try:
        return layout.read_manifest(collection)
    except (CollectionNotFound, RetrievalError):
        return None


def _known_vectors(collection: Path, current: layout.IndexManifest | None, embedder: Embedder | None) -> dict[str, Vectors]:
    """Text hash -> vector of the current build, if the same model made them."""
    if current is None or embedder is None or current.embedding != embedder.name:
        return {}
    import lancedb

    table = lancedb.connect(collection / current.build / layout.LANCE).open_table(layout.TABLE).to_arrow()
    vectors = np.asarray(table["vector"].combine_chunks().flatten(), dtype=np.float32).reshape(len(table), -1)
    return dict(zip(table["sha256"].to_pylist(), vectors, strict=True))


def _embed(chunks: Sequence[Chunk], known: dict[str, Vectors], embedder: Embedder, batch_size: int, progress: Progress) -> Vectors:
    """One vector per chunk, in order; computes only those whose text is new."""
    vectors = dict(known)
    new = list({chunk.sha256: chunk for chunk in chunks if chunk.sha256 not in known}.values())
    start = time.monotonic()
    for i in range(0, len(new), batch_size):
        batch = new[i : i + batch_size]
        for chunk, vector in zip(batch, embedder.passages([chunk.indexed_text for chunk in batch]), strict=True):
            vectors[chunk.sha256] = vector
        progress(f"embedded {i + len(batch)}/{len(new)} passages, {time.monotonic() - start:.1f} s")
    return np.stack([vectors[chunk.sha256] for chunk in chunks])


def _write(staged: Path, chunks: Sequence[Chunk], vectors: Vectors | None, ann_above: int) -> None:
    import lancedb
    import pyarrow as pa

    columns = {name: pa.array([getattr(chunk, name) for chunk in chunks]) for name in ("id", "text", "heading", "source", "sha256")}
    columns["row"] = pa.array(range(len(chunks)), pa.int32())
    if vectors is not None:
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])
    table = lancedb.connect(staged / layout.LANCE).create_table(layout.TABLE, pa.table(columns))
    if vectors is not None and len(chunks) > ann_above:
        table.create_index(metric="cosine", index_type="IVF_HNSW_SQ", vector_column_name="vector")
    Lexical.build([chunk.indexed_text for chunk in chunks]).save(staged / layout.BM25)


def _manifest(
    config: IndexConfig, current: layout.IndexManifest | None, digest: str, embedder: Embedder | None, counts: tuple[int, int]
) -> layout.IndexManifest:
    return layout.IndexManifest(
        collection=config.collection,
        build=f"build-{digest[:8]}-{uuid.uuid4().hex[:4]}",
        previous=current.build if current else None,
        embedding=embedder.name if embedder else None,
        dimension=embedder.dimension if embedder else 0,
        content_sha256=digest,
        num_documents=counts[0],
        num_chunks=counts[1],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
