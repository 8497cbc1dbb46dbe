"""Checkpoints that can be trusted: each rank adds only its own files, its list of them comes last, and reading checks the lists.

    checkpoint_00000040_000000061234/   step and milliseconds of training
      meta-rank0.json        step, world size, ZeRO stage, run, seconds trained; name -> [bytes, crc32] of rank 0's files
      meta-rank1.json        the same of rank 1's
      ...                    what TRL and DeepSpeed wrote
    .saving/rank1/           what a rank has not published yet

A checkpoint of which a list is missing was never finished. Knows no trainer and, but for the name of its list, no Ray.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1ray.errors import CheckpointCorrupt, DiskFull
from r1ray.train.standing import Standing

__all__ = [
    "Meta",
    "Unfinished",
    "best_good",
    "directory_name",
    "disk_full",
    "found",
    "last_good",
    "out_of_room",
    "publish",
    "read",
    "staging",
    "sweep",
]

_PREFIX = "checkpoint_"
_SAVING = ".saving"
_NUM_SPARE = 2
"""Newest finished checkpoints that stay whoever has heard of them: one to resume from, one to fall back to."""
_RAYS_LIST = "checkpoint_manager_snapshot.json"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_log = logging.getLogger(__name__)


class Unfinished(CheckpointCorrupt):
    """A rank's list is missing: the save was cut off."""


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


def read(directory: Path, *, part: int = 0, of: int = 1, whole: bool = True) -> Meta:
    """Check all lists of a checkpoint and every file on them; of several readers each takes one part of the files, equal in bytes.

    Unless `whole`, only that the files are there and as long as they were.

    Raises:
        Unfinished: a list is missing.
        CheckpointCorrupt: a list cannot be read, or a file is missing, cut off or altered.
    """
    meta, files = _lists(directory)
    for name in _share(files, part, of):
        path, (size, crc32) = directory / name, files[name]
        try:
            if path.stat().st_size != size:
                raise CheckpointCorrupt(f"{path} has {path.stat().st_size} bytes instead of {size}.")
            if whole and _crc32(path) != crc32:
                raise CheckpointCorrupt(f"{path} was altered after it was written.")
        except FileNotFoundError as error:
            raise CheckpointCorrupt(f"{directory} lacks {name}.") from error
        except OSError as error:
            raise CheckpointCorrupt(f"{path} cannot be read: {error}.") from error
    return meta


def found(run_directory: Path) -> list[Path]:
    """Every checkpoint directory of a run, newest first, good or not."""
    return sorted((path for path in run_directory.glob(f"{_PREFIX}[0-9]*") if path.is_dir()), reverse=True)


def last_good(
    run_directory: Path,
    *,
    among: Sequence[Path] | None = None,
    check: Callable[[Path], Meta] = read,
    warn: Callable[[str], object] = _log.warning,
) -> tuple[Path, Meta] | None:
    """The newest checkpoint that can be read; older ones are tried with a warning. None when the run has none yet.

    Args:
        among: Directories to try, newest first; by default all of the run.
        check: What `read` does, perhaps shared by several ranks.

    Raises:
        CheckpointCorrupt: there are finished checkpoints and none can be read.
    """
    problems: list[CheckpointCorrupt] = []
    for directory in found(run_directory) if among is None else among:
        try:
            good = directory, check(directory)
        except CheckpointCorrupt as error:
            problems.append(error)
            continue
        for problem in problems:
            warn(f"checkpoint skipped: {problem} Resuming from {directory.name}, step {good[1].step}.")
        return good
    finished = [problem for problem in problems if not isinstance(problem, Unfinished)]
    if finished:
        raise CheckpointCorrupt(
            f"None of the {len(finished)} checkpoints in {run_directory} can be read: {finished[0]} There is no good one to go back "
            "to; restore the directory from a backup, or start over with train.restart=true."
        )
    return None


def best_good(run_directory: Path, *, checked: Collection[str] = ()) -> tuple[Path, Meta] | None:
    """The checkpoint with the lowest loss on what was held out, of those that can be read; the newest where nothing was measured.

    `checked` names checkpoints that their ranks have just read: nobody need read them again, and the sizes of their files say enough.
    """

    def check(directory: Path) -> Meta:
        return read(directory, whole=directory.name not in checked)

    standing = _standing(run_directory)
    if standing.best_loss is not None:
        for directory in _of_step(found(run_directory), standing.best_step):
            with contextlib.suppress(CheckpointCorrupt):
                return directory, check(directory)
        _log.warning("the checkpoint of step %d, the best one, cannot be read: taking the newest", standing.best_step)
    return last_good(run_directory, check=check)


def staging(run_directory: Path, rank: int) -> Path:
    """Where a rank saves before it publishes: on the checkpoints' file system, so that publishing is a rename."""
    return run_directory / _SAVING / f"rank{rank}"


def sweep(run_directory: Path) -> list[Path]:
    """Remove what attempts that were killed left behind; gives the checkpoints that are finished, newest first.

    Only for whoever holds the run, while no rank trains it. A checkpoint that Ray Train has heard of was finished once, whatever has
    become of it since, and Ray Train would not start again without it: it stays, and goes when Ray Train lets it go. Of the others, whose
    workers died before they could tell, the best one and those among the newest are as good as any and stay as long as they are that.
    """
    shutil.rmtree(run_directory / _SAVING, ignore_errors=True)
    rays = run_directory / _RAYS_LIST
    heard_of = rays.read_text(encoding="utf-8") if rays.exists() else ""
    problems = {directory: _cut_off(directory) for directory in found(run_directory)}
    finished = [directory for directory, problem in problems.items() if problem is None]
    spared = [*finished[:_NUM_SPARE], *_of_step(finished, _standing(run_directory).best_step)[:1]]
    kept = [directory for directory in problems if directory.name in heard_of or directory in spared]
    for directory, problem in problems.items():
        if directory not in kept:
            why = problem or f"Ray Train does not know {directory}, and newer checkpoints have taken its place."
            _log.warning("%s It is removed.", why)
            shutil.rmtree(directory, ignore_errors=True)
    return kept


def _standing(run_directory: Path) -> Standing:
    """As the newest finished checkpoint has it."""
    for directory in found(run_directory):
        with contextlib.suppress(CheckpointCorrupt):
            return _lists(directory)[0].standing
    return Standing()


def _cut_off(directory: Path) -> Unfinished | None:
    """Whose list is missing. A list that cannot be read was written once; whoever reads it says so."""
    try:
        _lists(directory)
    except Unfinished as error:
        return error
    except CheckpointCorrupt:
        pass
    return None


def _of_step(directories: Sequence[Path], step: int) -> list[Path]:
    return [directory for directory in directories if directory.name.startswith(f"{_PREFIX}{step:08d}_")]


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


def _lists(directory: Path) -> tuple[Meta, dict[str, list[int]]]:
    """Of all ranks together: name -> [bytes, crc32]."""
    meta, files = _list(directory, 0)
    for rank in range(1, meta.world_size):
        files.update(_list(directory, rank)[1])
    return meta, files


def _share(files: Mapping[str, list[int]], part: int, of: int) -> list[str]:
    """Names for one of several readers: the largest first, each to whoever has the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(of)]
    burdens = [0] * of
    for name in sorted(files, key=lambda name: (-files[name][0], name)):
        reader = burdens.index(min(burdens))
        shares[reader].append(name)
        burdens[reader] += files[name][0]
    return shares[part]


def _list(directory: Path, rank: int) -> tuple[Meta, dict[str, list[int]]]:
    path = directory / f"meta-rank{rank}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = dict(content.pop("files"))
        return Meta(**{**content, "standing": Standing(**content.get("standing", {}))}), files
    except FileNotFoundError as error:
        raise Unfinished(f"{directory} was not finished: rank {rank} never wrote its list.") from error
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
