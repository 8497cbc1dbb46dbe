"""A run's identity and memory: the same job on the same data and base has the same directory, and resumes.

`run.json` in that directory says which MLflow run belongs to it and, when it is finished, which version came out.
Knows no training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1ray.config import config_hash
from r1ray.train.config import FinetuneConfig
from r1ray.types import Artifact

__all__ = ["RunState", "forget", "load", "run_name", "store"]

_FILE = "run.json"
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
    "restart": False,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a re-submitted job must know about its predecessor."""

    mlflow_run_id: str
    dtype: str
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


def forget(directory: Path) -> None:
    """Remove a run with its checkpoints; registered versions stay."""
    if directory.exists():
        _log.warning("train.restart: removing the earlier run %s", directory)
        shutil.rmtree(directory)
