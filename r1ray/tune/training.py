"""One trial of the hyperparameter sweep: a real training on part of the data, measured on the held-out part by its own workers.

A Ray Tune function that starts a Ray Train run of the same workers as jobs/finetune.py. The workers' reports reach Tune as they come,
so that a scheduler can stop the trial; a trial that is started again goes on from its last checkpoint. Registers nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from r1ray.environment import prepare_environment
from r1ray.errors import TrainingError
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train.config import FinetuneConfig
from r1ray.train.fit import fit
from r1ray.train.order import WorkOrder, resolve_order
from r1ray.train.progress import curve
from r1ray.train.soft_prompt import resolve_soft_prompt
from r1ray.train.standing import MARK
from r1ray.train.tokens import tokenise
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.heldout import divide

__all__ = ["DRIVER_CPUS", "train_trial"]

_log = logging.getLogger(__name__)

DRIVER_CPUS = 0.01
"""A trial's own process only waits while its workers compute."""


def train_trial(config: dict[str, Any], sweep: HyperparameterSweepConfig, runs: Path, num_concurrent: int, settings: Settings) -> None:
    """Ray Tune's entry. Reports `loss` and `step` while training, then `eval_loss` too."""
    prepare_environment()
    chosen = sweep.trial(config["values"])
    directory = runs / str(tune.get_context().get_trial_id())
    order = _prepare(chosen, sweep, directory, num_concurrent, settings)
    directory.mkdir(parents=True, exist_ok=True)
    summary = fit(order, callbacks=[TuneReportCallback()], outlived=True)
    loss, eval_loss = _losses(order)
    shutil.rmtree(directory)  # nothing resumes it from here on
    tune.report({"step": summary["step"], "loss": loss, "seconds": summary["elapsed_s"], "eval_loss": eval_loss})


def _prepare(
    config: FinetuneConfig, sweep: HyperparameterSweepConfig, directory: Path, num_concurrent: int, settings: Settings
) -> WorkOrder:
    """The workers measure the sweep's held-out rows, the same ones in every trial: at the end, and as often as train.eval_share wants."""
    base = Registry(settings).resolve(config.base)
    parts = divide(config.data, sweep)
    config = resolve_soft_prompt(config, parts[0], base, _log.info)
    trained, held_out = (tokenise(part, base, config.data, max_length=config.train.max_length, cache=settings.cache) for part in parts)
    train = config.train
    threads = train.threads_per_worker or max(1, (os.cpu_count() or 1) // (train.min_workers * num_concurrent))
    once = {
        "num_workers": train.min_workers,
        "threads_per_worker": threads,
        "max_failures": 0,
        "checkpoint_every_seconds": None,
        "num_checkpoints": 1,
        "eval_share": 0.0,  # the sweep has held rows out already
    }
    order = resolve_order(train.model_copy(update=once), base, trained, directory, settings, _log.info)
    measuring = {"eval_share": sweep.eval_share, "eval_every_steps": train.eval_every_steps if train.eval_share else sys.maxsize}
    return replace(order, config=order.config.model_copy(update=measuring), held_out=held_out)


def _losses(order: WorkOrder) -> tuple[float, float]:
    """(of the last step, the lowest on what was held out: of the step that jobs/finetune.py would register)."""
    steps = curve(order.run_directory)
    measured = [step.marks[MARK] for step in steps if MARK in step.marks]
    if not measured:
        raise TrainingError(f"Trial {order.run} left no held-out loss in {order.run_directory}. This is a defect.")
    return steps[-1].loss, min(measured)
