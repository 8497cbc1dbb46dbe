"""Conversations to Parquet and rejected rows to JSON lines; a file is complete or absent. Knows no format but these two."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from r1ray.data.records import Reject
from r1ray.data.schema import to_table
from r1ray.errors import DiskFull
from r1ray.types import Conversation

__all__ = ["staging", "write_parquet", "write_rejects"]

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


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
def staging(directory: Path) -> Iterator[Path]:
    """A hidden directory in `directory` whose files take their places there, all together, when the block succeeds.

    Raises:
        DiskFull: the block ran out of room; nothing of it stays.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=directory, prefix=".prepare-"))
        try:
            yield staged
            for path in sorted(staged.iterdir()):
                if path.is_dir() and (directory / path.name).is_dir():
                    shutil.rmtree(directory / path.name)
                path.replace(directory / path.name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        if error.errno in _NO_ROOM or "No space left" in str(error):
            raise DiskFull(
                f"No room to write in {directory}: {error}. Nothing was left there. Free some, or set out to another disk."
            ) from error
        raise


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
