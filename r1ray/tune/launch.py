"""Runs or resumes one sweep on Ray Tune. Knows neither what a trial does nor what its numbers mean.

A sweep is named after its configuration: submitting the same one again resumes it (or, when it was complete, just returns its results).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from r1ray.errors import TuningError

__all__ = ["Sweep", "SweepOutcome", "run_sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What Ray Tune needs to know. `show` turns a trial's last metrics into the words of its progress line."""

    name: str
    storage: Path
    num_samples: int
    max_concurrent: int
    show: Callable[[dict[str, Any]], str]
    metric: str | None = None
    mode: str | None = None
    reuse_actors: bool = False
    max_failures: int = 1

    @property
    def path(self) -> Path:
        return self.storage / self.name


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """The trials in order of creation, finished or not. `resumed` tells whether an earlier submission had begun."""

    results: Sequence[tune.Result]
    resumed: bool
    seconds: float = field(compare=False)


def run_sweep(sweep: Sweep, trainable: Any, searcher: Searcher, scheduler: TrialScheduler | None = None) -> SweepOutcome:
    """Blocks until every trial has ended.

    Raises:
        TuningError: no trial finished; quotes the first error.
    """
    # With Tune's newer output even verbose=0 draws boxes into the job log, which has our progress lines.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    start = time.monotonic()
    resumed = _can_resume(sweep.path)
    tuner = _restored(sweep, trainable) if resumed else _fresh(sweep, trainable, searcher, scheduler)
    grid = tuner.fit()
    results = [grid[i] for i in range(len(grid))]
    if not any(result.error is None and result.metrics for result in results):
        first = next((str(result.error).strip().splitlines()[-1] for result in results if result.error), "no trial started")
        raise TuningError(f"None of {len(results)} trials finished: {first}. The trials' logs are below {sweep.path}.")
    return SweepOutcome(results, resumed, time.monotonic() - start)


def _can_resume(path: Path) -> bool:
    """Killed before its first snapshot, a sweep has nothing to resume; what little it left is removed."""
    if tune.Tuner.can_restore(str(path)) and any(path.glob("experiment_state-*.json")):
        return True
    shutil.rmtree(path, ignore_errors=True)
    return False


def _restored(sweep: Sweep, trainable: Any) -> tune.Tuner:
    print(f"resuming {sweep.path}", flush=True)
    return tune.Tuner.restore(str(sweep.path), trainable=trainable, resume_unfinished=True, restart_errored=True)


def _fresh(sweep: Sweep, trainable: Any, searcher: Searcher, scheduler: TrialScheduler | None) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=sweep.num_samples,
            max_concurrent_trials=sweep.max_concurrent,
            reuse_actors=sweep.reuse_actors,
            trial_dirname_creator=_trial_directory,
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=str(sweep.storage),
            verbose=0,
            callbacks=[Progress(sweep.num_samples, sweep.show)],
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial has no state worth keeping
        ),
    )


class Progress(tune.Callback):
    """One line per trial that starts, ends or fails, so that a job's log tells what it is waiting for."""

    def __init__(self, num_trials: int, show: Callable[[dict[str, Any]], str]) -> None:
        self._num_trials = num_trials
        self._show = show
        self._ended = 0

    def on_trial_start(self, **event: Any) -> None:
        print(f"trial {len(event['trials'])}/{self._num_trials} {_name(event['trial'])} started", flush=True)

    def on_trial_complete(self, **event: Any) -> None:
        self._ended += 1
        print(f"[{self._ended}/{self._num_trials}] {_name(event['trial'])}: {self._show(event['trial'].last_result or {})}", flush=True)

    def on_trial_error(self, **event: Any) -> None:
        print(f"trial {_name(event['trial'])} failed; its error is in {event['trial'].local_path}", flush=True)


def _name(trial: Any) -> str:
    return str(trial.config.get("name", trial.trial_id))


def _trial_directory(trial: Any) -> str:
    return str(trial.trial_id)
