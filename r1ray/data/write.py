"""Conversations to Parquet and rejected rows to JSON lines; a file is complete or absent. Knows no format but these two."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from r1ray.data.records import Reject
from r1ray.data.schema import to_table
from r1ray.types import Conversation

__all__ = ["write_parquet", "write_rejects"]


def write_parquet(conversations: Sequence[Conversation], path: Path) -> Path:
    """Write `SCHEMA` rows; the same conversations give the same bytes."""
    with _replacing(path) as temporary:
        pq.write_table(to_table(conversations), temporary, compression="zstd")
    return path


def write_rejects(rejects: Sequence[Reject], path: Path) -> Path:
    """One `{"file", "row", "reason"}` object per line; no rejects give an empty file, so that a stale report never stays."""
    lines = (json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
    with _replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
