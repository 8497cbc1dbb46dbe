"""A run's identity and memory: the same job on the same data and base has the same directory, and resumes.

`run.json` in that directory says which MLflow run belongs to it and, when it is finished, which version came out. `.lock` is held by the
job that trains it. Knows no training.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1ray.config import config_hash
from r1ray.errors import RunInUse
from r1ray.model.load import Dtype
from r1ray.train.config import FinetuneConfig
from r1ray.types import Artifact

__all__ = ["RunState", "forget", "held", "load", "run_name", "store"]

_FILE = "run.json"
_LOCK = ".lock"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
# What changes neither the batches nor the loss: changing it resumes the run.
_NEUTRAL = {
    "num_workers": 1,
    "use_gpu": False,
    "cpus_per_worker": 1,
    "threads_per_worker": None,
    "micro_batch_size": 1,
    "log_every_steps": 1,
    "checkpoint_every_steps": None,
    "checkpoint_every_seconds": None,
    "num_checkpoints": 1,
    "max_failures": 0,
    "collective_timeout_s": 60,
    "restart": False,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a re-submitted job must know about its predecessor."""

    mlflow_run_id: str
    dtype: Dtype
    micro_batch_size: int | None = None
    """What an earlier attempt had to come down to, for want of memory."""
    version: str | None = None


def run_name(config: FinetuneConfig, base: Artifact, data_hash: str) -> str:
    """`name-<12 hex>` over what affects the result: config, base weights and template, rows. Not the place of the rows."""
    train = config.train.model_copy(update=_NEUTRAL)
    data = config.data.model_copy(update={"path": Path(), "rejects": None, "backend": "arrow"})
    neutral = config.model_copy(update={"train": train, "data": data})
    parts = [config_hash(neutral), base.manifest.weights_sha256, base.manifest.template.sha256, data_hash]
    return f"{config.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def load(directory: Path) -> RunState | None:
    """None for a new run, and for one whose state was lost: its checkpoints still count."""
    try:
        return RunState(**json.loads((directory / _FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s cannot be read and is written anew: %s", directory / _FILE, error)
        return None


def store(directory: Path, state: RunState, *, version: str | None = None) -> RunState:
    """Write atomically; `version` marks the run as finished."""
    state = replace(state, version=version or state.version)
    unfinished = directory / f".{_FILE}"
    unfinished.write_text(json.dumps(asdict(state)), encoding="utf-8")
    unfinished.rename(directory / _FILE)
    return state


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the run for as long as the block lasts, against every other job that can see its directory; its holder's death frees it.

    Raises:
        RunInUse: another job holds it; says which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunInUse(
                f"{directory.name} is being trained by another job: {lock.read() or 'which has not said who it is'}. Follow that one, or "
                "stop it (ray job stop) and submit this again: it resumes."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s cannot be locked (%s): see to it that no other job trains it", directory, error.strerror)
        lock.truncate(0)
        lock.write(_whoami())
        lock.flush()
        yield


def forget(directory: Path) -> None:
    """Remove a run with its checkpoints, by whoever holds it; registered versions stay."""
    before = [path for path in directory.iterdir() if path.name != _LOCK]
    if before:
        _log.warning("train.restart: removing the earlier run %s", directory)
    for path in before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _whoami() -> str:
    """`host gpu-3, pid 4711, Ray job raysubmit_x`; the last for submitted jobs only."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata", {}).get("job_submission_id")
    return f"host {socket.gethostname()}, pid {os.getpid()}" + (f", Ray job {submitted}" if submitted else "")
