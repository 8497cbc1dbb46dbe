"""Artifact directories: staged in the dark, sealed by a manifest written last, checked when opened.

Takes directories and manifests. Knows nothing of versions, aliases or MLflow.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, ValidationError

from r1ray.errors import ArtifactInvalid, DiskFull
from r1ray.types import Artifact, Manifest, SamplingPolicy

__all__ = [
    "MANIFEST",
    "POLICY",
    "abandoned",
    "announced",
    "directory_lock",
    "manifest_sha256",
    "open_artifact",
    "seal",
    "staging",
    "sweep",
    "weights_sha256",
    "write_atomic",
]

MANIFEST = "manifest.json"
POLICY = "sampling_policy.json"

T = TypeVar("T", bound=BaseModel)

_STAGING = ".staging"
_ANNOUNCED = ".announced"
_FOREIGN_STALE_S = 7 * 24 * 3600.0
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_log = logging.getLogger(__name__)


def weights_sha256(directory: Path) -> str:
    """Hash over the contents of `*.safetensors`, or of an ONNX export's graphs and weights, in name order.

    Raises:
        ArtifactInvalid: the directory holds neither.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.onnx*"))
    if not files:
        raise ArtifactInvalid(f"{directory} holds neither *.safetensors nor *.onnx. Save the model with save_pretrained first.")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def manifest_sha256(directory: Path) -> str:
    """Hash of `manifest.json` as it lies there: tells an altered one from the registered one."""
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()


@contextmanager
def staging(artifacts: Path, name: str) -> Iterator[Path]:
    """A hidden directory on the artifacts' file system, removed on leaving unless it was moved away.

    Its name carries host, pid and start time of the process, so that the next writer can tell a dead one's leftovers.

    Raises:
        DiskFull: the block ran out of room; nothing is left behind.
    """
    sweep(artifacts)
    root = artifacts / _STAGING
    root.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f"{_signed(name)}~", dir=root))
    staged.chmod(0o755)  # mkdtemp's 0700 would follow the artifact into shared storage
    try:
        yield staged
    except Exception as error:
        written = _size(staged)
        shutil.rmtree(staged, ignore_errors=True)
        if _out_of_room(error):
            raise DiskFull(_no_room(artifacts, name, written)) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sweep(artifacts: Path) -> list[Path]:
    """Remove what dead writers left; of another host's, only what nobody has touched for a week."""
    stale = [path for path in (artifacts / _STAGING).glob("*") if _is_stale(path)]
    for path in stale:
        _log.warning("removing %s: its writer is gone", path)
        shutil.rmtree(path, ignore_errors=True)
    return stale


@contextmanager
def announced(place: Path, registry_uri: str) -> Iterator[None]:
    """While a finished directory waits at `place` for its version number: removed when that fails, found by `abandoned` after a kill."""
    note = place.parent.parent / _ANNOUNCED / f"{_signed(place.parent.name)}~{place.name}"
    note.parent.mkdir(exist_ok=True)
    note.write_text(registry_uri, encoding="utf-8")
    try:
        yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        note.unlink(missing_ok=True)


def abandoned(artifacts: Path, registry_uri: str) -> list[tuple[Path, Path]]:
    """(note, directory) of every writer that died while it was numbering in this registry; another registry's are its own to judge."""
    found = []
    for note in (artifacts / _ANNOUNCED).glob("*"):
        with suppress(FileNotFoundError):  # its writer has just finished
            if _is_stale(note) and note.read_text(encoding="utf-8") == registry_uri:
                name, *_, place = note.name.rsplit("~", 4)
                found.append((note, artifacts / name / place))
    return found


def seal(staged: Path, manifest: Manifest) -> Manifest:
    """Force every file to disk, then write `manifest.json` with the list of files. Gives the manifest as written.

    Raises:
        ArtifactInvalid: the directory is empty or holds a link, which would break when the artifact moves.
    """
    files: dict[str, int] = {}
    for path in sorted(staged.rglob("*")):
        if path.is_symlink():
            raise ArtifactInvalid(f"{path} is a link. An artifact must hold its own files: copy what it points to.")
        if path.is_file() and path.name not in (MANIFEST, POLICY):
            files[path.relative_to(staged).as_posix()] = path.stat().st_size
        _fsync(path)
    if not files:
        raise ArtifactInvalid(f"{staged} is empty. Write the model's files into it before registering.")
    sealed = manifest.model_copy(update={"files": files})
    write_atomic(staged / MANIFEST, sealed)
    return sealed


def open_artifact(path: Path, *, version: int = 0) -> Artifact:
    """Read and check one artifact directory.

    Raises:
        ArtifactInvalid: no manifest, an unreadable one, or a file that is missing or has another size.
    """
    manifest = _read(path / MANIFEST, Manifest)
    _check_files(path, manifest)
    policy = _read(path / POLICY, SamplingPolicy) if (path / POLICY).exists() else None
    return Artifact(path=path, manifest=manifest, version=version, policy=policy)


def _check_files(path: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there with its size; contents are `Registry.verify`'s, since hashing reads all bytes."""
    for name, num_bytes in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactInvalid(f"{path} misses {name}. Restore it, or register the model again.")
        if (found := file.stat().st_size) != num_bytes:
            raise ArtifactInvalid(f"{file} has {found} bytes, the manifest says {num_bytes}. Restore it, or register the model again.")


def write_atomic(path: Path, record: BaseModel) -> None:
    """A reader sees the old file or the new one, never a part."""
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        _fsync(fresh)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if _out_of_room(error):
            raise DiskFull(_no_room(path.parent, path.name, len(text))) from error
        raise
    _fsync(path.parent)


def directory_lock(artifacts: Path) -> Path:
    """Where writers of one home wait for each other."""
    return artifacts / ".lock"


def _read(path: Path, schema: type[T]) -> T:
    try:
        return schema.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactInvalid(f"{path.parent} has no {path.name}: no complete artifact. Give a registered model's directory.") from error
    except (ValidationError, OSError) as error:
        raise ArtifactInvalid(f"{path} cannot be read: {error}. Register the model again.") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_stale(staged: Path) -> bool:
    _, host, pid, started, _ = (staged.name.rsplit("~", 4) + [""] * 5)[:5]
    if host != _host() or not pid.isdigit():
        return time.time() - _touched(staged) > _FOREIGN_STALE_S
    return _started(int(pid)) != started


def _touched(path: Path) -> float:
    try:
        return max(file.stat().st_mtime for file in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()  # its writer is at work


def _started(pid: int) -> str:
    """Start time of a living process, empty for a dead one: tells a reused pid from the writer's."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(int(process.create_time()))
    except psutil.NoSuchProcess:
        return ""


def _signed(name: str) -> str:
    """`name`, and who writes it: host, pid, start time."""
    return f"{name}~{_host()}~{os.getpid()}~{_started(os.getpid())}"


def _host() -> str:
    return socket.gethostname().replace("~", "-").replace("/", "-")


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _out_of_room(error: BaseException | None) -> bool:
    """Whether a full disk lies behind `error`; libraries wrap the OSError (safetensors keeps only its text)."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _NO_ROOM) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_room(where: Path, what: str, num_bytes: int) -> str:
    free = shutil.disk_usage(where).free
    return (
        f"No room for {what} in {where}: {num_bytes / 1e6:.1f} MB were written, {free / 1e6:.1f} MB are free now. "
        "Free disk space (`r1ray models` shows old versions) or set R1RAY_HOME to a larger disk."
    )
