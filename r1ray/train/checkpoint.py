"""Checkpoints that can be trusted: each rank adds only its own files, its list of them comes last, and reading checks the lists.

    checkpoint_00000040_000000061234/   step and milliseconds of training
      meta-rank0.json        step, world size, ZeRO stage, run, seconds trained; name -> [bytes, crc32] of rank 0's files
      meta-rank1.json        the same of rank 1's
      ...                    what TRL and DeepSpeed wrote

A checkpoint of which a list is missing was never finished. Knows no trainer and no Ray.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1ray.errors import CheckpointCorrupt, DiskFull
from r1ray.train.standing import Standing

__all__ = ["Meta", "best_good", "directory_name", "disk_full", "found", "last_good", "publish", "read"]

_PREFIX = "checkpoint_"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What a checkpoint was written by."""

    run: str
    step: int
    world_size: int
    zero_stage: int
    elapsed_s: float
    standing: Standing = field(default_factory=Standing)


def directory_name(step: int, elapsed_s: float) -> str:
    """Sorts by step, then by time: a step that is saved twice, after falling back to an older checkpoint, gets two names."""
    return f"{_PREFIX}{step:08d}_{round(elapsed_s * 1000):012d}"


def publish(source: Path, destination: Path, meta: Meta, rank: int) -> None:
    """Move a rank's files from `source` to `destination` (same file system), its list of them last.

    Raises:
        DiskFull: no room for the list; the files already moved do not make a checkpoint.
    """
    files: dict[str, list[int]] = {}
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source).as_posix()
            files[name] = [path.stat().st_size, _crc32(path)]
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination / name)
        unfinished = destination / f".meta-rank{rank}"
        unfinished.write_text(json.dumps({**asdict(meta), "files": files}), encoding="utf-8")
        unfinished.rename(destination / f"meta-rank{rank}.json")
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise disk_full(destination, error) from error
        raise


def read(directory: Path) -> Meta:
    """Check every file of a checkpoint.

    Raises:
        CheckpointCorrupt: a list is missing, or a file is missing, cut off or altered.
    """
    meta, files = _list(directory, 0)
    for rank in range(1, meta.world_size):
        files.update(_list(directory, rank)[1])
    for name, (size, crc32) in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointCorrupt(f"{directory} lacks {name}.")
        if path.stat().st_size != size:
            raise CheckpointCorrupt(f"{path} has {path.stat().st_size} bytes instead of {size}.")
        if _crc32(path) != crc32:
            raise CheckpointCorrupt(f"{path} was altered after it was written.")
    return meta


def found(run_directory: Path) -> list[Path]:
    """Every checkpoint directory of a run, newest first, good or not."""
    return sorted((path for path in run_directory.glob(f"{_PREFIX}[0-9]*") if path.is_dir()), reverse=True)


def last_good(run_directory: Path) -> tuple[Path, Meta] | None:
    """The newest checkpoint that can be read; older ones are tried with a warning. None when the run has none yet.

    Raises:
        CheckpointCorrupt: there are finished checkpoints and none can be read.
    """
    problems: list[str] = []
    num_finished = 0
    for directory in found(run_directory):
        num_finished += (directory / "meta-rank0.json").exists()
        try:
            good = directory, read(directory)
        except CheckpointCorrupt as error:
            problems.append(str(error))
            continue
        for problem in problems:
            _log.warning("checkpoint skipped: %s Resuming from %s, step %d.", problem, directory.name, good[1].step)
        return good
    if num_finished:
        raise CheckpointCorrupt(
            f"None of the {num_finished} checkpoints in {run_directory} can be read: {problems[0]} There is no good one to go back "
            "to; restore the directory from a backup, or start over with train.restart=true."
        )
    return None


def best_good(run_directory: Path) -> tuple[Path, Meta] | None:
    """The checkpoint with the lowest loss on what was held out, of those that can be read; the newest where nothing was measured."""
    last = last_good(run_directory)
    if last is None or last[1].standing.best_loss is None:
        return last
    for directory in found(run_directory):
        if directory.name.startswith(f"{_PREFIX}{last[1].standing.best_step:08d}_"):
            with contextlib.suppress(CheckpointCorrupt):
                return directory, read(directory)
    _log.warning("the checkpoint of step %d, the best one, cannot be read: taking step %d", last[1].standing.best_step, last[1].step)
    return last


def disk_full(path: Path, cause: object) -> DiskFull:
    """The error for a checkpoint that found no room."""
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    return DiskFull(
        f"No room to save {path.name} in {place}: {cause} ({free / 2**20:.0f} MiB free). Earlier checkpoints are untouched. Free some "
        "space or move R1RAY_HOME, then submit the same job again: it resumes."
    )


def out_of_room(error: BaseException, directory: Path) -> bool:
    """Whether a failed save is the disk's fault.

    safetensors has an exception of its own that quotes the system's words; torch raises a bare RuntimeError, so the free space decides.
    """
    text = str(error).lower()
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or "no space left" in text:
        return True
    return any(word in text for word in _WRITE_FAILED) and _is_full(directory)


_WRITE_FAILED = ("file write failed", "enforce fail", "unexpected pos", "i/o error", "file too large")


def _is_full(directory: Path) -> bool:
    return shutil.disk_usage(directory).free < 64 * 2**20


def _list(directory: Path, rank: int) -> tuple[Meta, dict[str, list[int]]]:
    path = directory / f"meta-rank{rank}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = dict(content.pop("files"))
        return Meta(**{**content, "standing": Standing(**content.get("standing", {}))}), files
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{directory} was not finished: rank {rank} never wrote its list.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error}.") from error


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        for chunk in _chunks(stream):
            value = zlib.crc32(chunk, value)
    return value


def _chunks(stream: object) -> Iterator[bytes]:
    while chunk := stream.read(1 << 20):  # type: ignore[attr-defined]
        yield chunk
