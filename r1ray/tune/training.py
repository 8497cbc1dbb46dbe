"""One trial of the hyperparameter sweep: a real training on part of the data, its loss on the held-out part at the end.

A Ray Tune function that starts a Ray Train run of the same workers as jobs/finetune.py. The workers' reports reach Tune as they come,
so that a scheduler can stop the trial; a trial that is started again goes on from its last checkpoint. Registers nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ray import tune

from r1ray import cluster
from r1ray.errors import R1RayError, TrainingError
from r1ray.model.load import choose_dtype, load_model
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train import checkpoint
from r1ray.train.config import FinetuneConfig, TrainConfig
from r1ray.train.failures import unwrap
from r1ray.train.tokens import TokenSet, tokenise
from r1ray.train.worker import WorkOrder, plan_of, work
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.heldout import divide, held_out_loss

__all__ = ["DRIVER_CPUS", "train_trial", "worker_bundles"]

DRIVER_CPUS = 0.01
"""A trial's own process only waits while its workers compute."""


def worker_bundles(config: TrainConfig) -> list[dict[str, float]]:
    """What the workers of one trial reserve."""
    return [{"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}] * config.num_workers


def train_trial(config: dict[str, Any], sweep: HyperparameterSweepConfig, runs: Path, num_concurrent: int, settings: Settings) -> None:
    """Ray Tune's entry. Reports `loss` and `step` while training, then `eval_loss` too."""
    cluster.prepare_environment()
    chosen = sweep.trial(config["values"])
    directory = runs / str(tune.get_context().get_trial_id())
    order, held_out = _prepare(chosen, sweep, directory, num_concurrent, settings)
    directory.mkdir(parents=True, exist_ok=True)
    summary = _fit(order)
    last = checkpoint.last_good(directory)
    assert last is not None, "training ends with a checkpoint"
    loss = held_out_loss(_trained_model(order, last[0]), held_out)
    shutil.rmtree(last[0])
    tune.report({"step": summary["step"], "loss": summary["loss"], "seconds": summary["elapsed_s"], "eval_loss": loss})


def _prepare(
    config: FinetuneConfig, sweep: HyperparameterSweepConfig, directory: Path, num_concurrent: int, settings: Settings
) -> tuple[WorkOrder, TokenSet]:
    base = Registry(settings).resolve(config.base)
    sets = [
        tokenise(part, base, config.data, max_length=config.train.max_length, cache=settings.cache) for part in divide(config.data, sweep)
    ]
    train = config.train
    cores = os.cpu_count() or 1
    threads = train.threads_per_worker or max(1, cores // (train.num_workers * num_concurrent))
    plan = plan_of(train, [len(row) for row in sets[0].rows()[0]])
    order = WorkOrder(
        config=train.model_copy(update={"threads_per_worker": threads, "max_failures": 0, "checkpoint_every_seconds": None}),
        base=base,
        tokens=sets[0],
        run=directory.name,
        run_directory=directory,
        num_steps=min(plan.num_steps, train.max_steps or plan.num_steps),
        dtype=_dtype(train),
        attention=train.attention if train.attention != "auto" else "sdpa" if train.use_gpu else "eager",
        settings=settings,
    )
    return order, sets[1]


def _dtype(config: TrainConfig) -> str:
    if config.dtype != "auto" or config.use_gpu or config.zero_stage == 0:
        return {"auto": "bfloat16" if config.use_gpu else "float32"}.get(config.dtype, config.dtype)
    return str(choose_dtype("cpu")[0]).removeprefix("torch.")


def _fit(order: WorkOrder) -> dict[str, Any]:
    """Runs the workers; the last step, its loss and the seconds trained."""
    from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    config = order.config
    environment = cluster.worker_environment(threads=config.threads_per_worker or 1, use_gpu=config.use_gpu)
    trainer = TorchTrainer(
        work,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=worker_bundles(config)[0]
        ),
        run_config=RunConfig(
            name=order.run,
            storage_path=str(order.run_directory.parent),
            callbacks=[TuneReportCallback()],
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {**environment, "PYTHONWARNINGS": "ignore"}},
        ),
    )
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise unwrap(error, order.run_directory) from error
    if isinstance(outcome.get("error"), R1RayError):
        raise outcome["error"]
    return {**outcome, "loss": _last_loss(order)}


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

        return AutoModelForCausalLM.from_pretrained(trained, dtype=getattr(torch, order.dtype)).eval()
    from peft import PeftModel

    base = load_model(order.base, registry=Registry(order.settings), dtype=order.dtype)  # type: ignore[arg-type]
    return PeftModel.from_pretrained(base, str(trained)).eval()
