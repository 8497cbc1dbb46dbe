"""One trial of the hyperparameter sweep: a real training on part of the data, its loss on the held-out part at the end.

A Ray Tune function that starts a Ray Train run of the same workers as jobs/finetune.py. The workers' reports reach Tune as they come,
so that a scheduler can stop the trial; a trial that is started again goes on from its last checkpoint. Registers nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from r1ray import cluster
from r1ray.errors import TrainingError
from r1ray.model.load import load_model
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train import checkpoint
from r1ray.train.config import FinetuneConfig
from r1ray.train.fit import fit
from r1ray.train.order import WorkOrder, resolve_order
from r1ray.train.tokens import TokenSet, tokenise
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.heldout import divide, held_out_loss

__all__ = ["DRIVER_CPUS", "train_trial"]

_log = logging.getLogger(__name__)

DRIVER_CPUS = 0.01
"""A trial's own process only waits while its workers compute."""


def train_trial(config: dict[str, Any], sweep: HyperparameterSweepConfig, runs: Path, num_concurrent: int, settings: Settings) -> None:
    """Ray Tune's entry. Reports `loss` and `step` while training, then `eval_loss` too."""
    cluster.prepare_environment()
    chosen = sweep.trial(config["values"])
    directory = runs / str(tune.get_context().get_trial_id())
    order, held_out = _prepare(chosen, sweep, directory, num_concurrent, settings)
    directory.mkdir(parents=True, exist_ok=True)
    summary = fit(order, callbacks=[TuneReportCallback()], outlived=True)
    last = checkpoint.last_good(directory)
    assert last is not None, "training ends with a checkpoint"
    loss = held_out_loss(_trained_model(order, last[0]), held_out)
    shutil.rmtree(last[0])
    tune.report({"step": summary["step"], "loss": _last_loss(order), "seconds": summary["elapsed_s"], "eval_loss": loss})


def _prepare(
    config: FinetuneConfig, sweep: HyperparameterSweepConfig, directory: Path, num_concurrent: int, settings: Settings
) -> tuple[WorkOrder, TokenSet]:
    base = Registry(settings).resolve(config.base)
    sets = [
        tokenise(part, base, config.data, max_length=config.train.max_length, cache=settings.cache) for part in divide(config.data, sweep)
    ]
    train = config.train
    threads = train.threads_per_worker or max(1, (os.cpu_count() or 1) // (train.min_workers * num_concurrent))
    once = {
        "num_workers": train.min_workers,
        "threads_per_worker": threads,
        "max_failures": 0,
        "checkpoint_every_seconds": None,
        "num_checkpoints": 1,
    }
    return resolve_order(train.model_copy(update=once), base, sets[0], directory, settings, _log.info), sets[1]


def _last_loss(order: WorkOrder) -> float:
    from r1ray.train.progress import curve

    steps = curve(order.run_directory)
    if not steps:
        raise TrainingError(f"Trial {order.run} left no learning curve in {order.run_directory}. This is a defect.")
    return steps[-1].loss


def _trained_model(order: WorkOrder, trained: Path) -> Any:
    import torch

    torch.set_num_threads(order.config.threads_per_worker or 1)
    if order.config.method == "full":
        from transformers import AutoModelForCausalLM

        from r1ray.train.consolidate import with_weights

        with_weights(trained, order.dtype)
        return AutoModelForCausalLM.from_pretrained(trained, dtype=getattr(torch, order.dtype)).eval()
    from peft import PeftModel

    base = load_model(order.base, registry=Registry(order.settings), dtype=order.dtype)  # type: ignore[arg-type]
    return PeftModel.from_pretrained(base, str(trained)).eval()
