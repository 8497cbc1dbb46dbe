"""One sweep in MLflow: a parent run, a child run per trial, each written once however often the sweep is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1ray.observe.tracking import Run
from r1ray.settings import Settings

__all__ = ["SweepRecord", "sweep_record"]


class SweepRecord:
    """The parent run, and which trials already have their child run (a JSON file beside the sweep's directory)."""

    def __init__(self, run: Run, memory: Path, recorded: list[str]) -> None:
        self.run = run
        self._memory = memory
        self._recorded = recorded
        self._remember()

    def trial(self, key: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A child run for the trial `key`, unless it has one."""
        if key in self._recorded:
            return
        with Run(self.run.experiment, name, settings=self.run.settings, parent_run_id=self.run.id) as child:
            child.log_params(params)
            child.log_metrics(metrics)
        self._recorded.append(key)
        self._remember()

    def _remember(self) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        self._memory.write_text(json.dumps({"run_id": self.run.id, "recorded": self._recorded}), encoding="utf-8")


@contextmanager
def sweep_record(experiment: str, name: str, settings: Settings) -> Iterator[SweepRecord]:
    """Opens the sweep's parent run, the same one when the sweep is resumed."""
    memory = settings.checkpoints / f"{name}.mlflow.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    with Run(experiment, name, settings=settings, resume_run_id=known.get("run_id")) as run:
        yield SweepRecord(run, memory, list(known.get("recorded", [])))
