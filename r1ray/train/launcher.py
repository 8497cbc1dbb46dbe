"""One fine-tuning job from start to version: check, read, tokenise, train on the cluster, register.

Runs in the driver (`ray job submit`); the workers run `worker.work`. Submitting the same job again resumes it, or names the
version it has already made.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1ray import cluster
from r1ray.data.read import read_conversations
from r1ray.errors import R1RayError, RegistryError, TrainingError, UnsupportedModel
from r1ray.model.load import choose_dtype
from r1ray.observe.tracking import Run
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train import checkpoint, runs
from r1ray.train.batches import accumulation_steps
from r1ray.train.config import FinetuneConfig, TrainConfig
from r1ray.train.export import Result, export
from r1ray.train.failures import unwrap
from r1ray.train.plot import draw, sparkline
from r1ray.train.progress import Follower, Step, curve, line
from r1ray.train.tokens import TokenSet, tokenise
from r1ray.train.worker import WorkOrder, plan_of, work
from r1ray.types import Artifact

__all__ = ["finetune"]

EXPERIMENT = "finetune"
_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, settings: Settings | None = None) -> Artifact:
    """The registered version that `config` describes; trained now, resumed, or found finished.

    Raises:
        ClusterTooSmall: the workers can never be placed; within a second.
        NothingToTrain, TooManyBadRows: the data cannot be learned from.
        TrainingError: a worker failed more often than `train.max_failures`, the loss diverged, the disk is full.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = settings or Settings()
    _check_cluster(config.train, settings)
    registry = Registry(settings)
    base = _base(config, registry)
    loaded = read_conversations(config.data)
    run = runs.run_name(config, base, loaded.data_hash)
    directory = settings.checkpoints / run
    if config.train.restart:
        runs.forget(directory)
    if (done := _finished(directory, registry)) is not None:
        _say(f"{run} is finished: {done.ref} (train.restart=true trains it again)")
        return done
    tokens = tokenise(loaded, base, config.data, max_length=config.train.max_length, cache=settings.cache)
    directory.mkdir(parents=True, exist_ok=True)
    return _train(config, _order(config.train, base, tokens, directory, settings), loaded.data_hash, registry)


def _train(config: FinetuneConfig, order: WorkOrder, data_hash: str, registry: Registry) -> Artifact:
    known = runs.load(order.run_directory)
    with Run(EXPERIMENT, order.run, settings=order.settings, resume_run_id=known.mlflow_run_id if known else None) as tracked:
        tracked.log_params(config.model_dump(mode="json") | {"base": order.base.ref, "data_hash": data_hash})
        state = runs.store(order.run_directory, runs.RunState(mlflow_run_id=tracked.id, dtype=order.dtype))

        def on_steps(steps: list[Step]) -> None:
            _say(line(steps))
            tracked.log_metrics(steps[-1].metrics(), step=steps[-1].step)

        started = time.monotonic()
        with Follower(order.run_directory, on_steps, every=config.train.log_every_steps):
            last = _fit(order)
        steps = curve(order.run_directory)
        _say(f"loss {sparkline([step.loss for step in steps])}")
        tracked.log_artifact(draw(steps, order.run_directory / "learning_curve.png"))
        metrics = _metrics(order, time.monotonic() - started)
        tracked.log_metrics(metrics)
        result = Result(checkpoint=last, config=config, base=order.base, data_hash=data_hash, metrics=metrics, run_id=tracked.id)
        artifact = export(result, registry)
        runs.store(order.run_directory, state, version=artifact.ref)
    _say(f"registered {artifact.ref}: {artifact.path}")
    return artifact


def _fit(order: WorkOrder) -> Path:
    """Run the workers; the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = order.config
    environment = cluster.worker_environment(threads=_threads(config), use_gpu=config.use_gpu)
    trainer = TorchTrainer(
        work,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=_bundle(config)),
        run_config=RunConfig(
            name=order.run,
            storage_path=str(order.run_directory.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.num_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {**environment, "PYTHONWARNINGS": "ignore"}},
        ),
    )
    _say(f"starting {config.num_workers} workers (each loads torch and the base, about 10 s)")
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise unwrap(error, order.run_directory) from error
    if isinstance(outcome.get("error"), R1RayError):
        raise outcome["error"]
    last = checkpoint.last_good(order.run_directory)
    if last is None:
        raise TrainingError(f"Training of {order.run} ended without a checkpoint in {order.run_directory}. This is a defect.")
    return last[0]


def _order(config: TrainConfig, base: Artifact, tokens: TokenSet, directory: Path, settings: Settings) -> WorkOrder:
    """Resolve what is left to choose, and say what and why."""
    lengths = [len(row) for row in tokens.rows()[0]]
    plan = plan_of(config, lengths)
    num_steps = min(plan.num_steps, config.max_steps or plan.num_steps)
    accumulation = accumulation_steps(config.batch_size, config.num_workers, config.micro_batch_size)
    padding = 0.0 if config.packing else plan.padding_share(config.num_workers, accumulation)
    known = runs.load(directory)
    dtype, reason = (known.dtype, "the run began with it") if known else _dtype(config)
    attention = config.attention if config.attention != "auto" else "sdpa" if config.use_gpu else "eager"
    _say(f"{directory.name} on {base.ref}")
    _say(f"{tokens.num_rows} dialogues, {tokens.num_tokens} tokens, {tokens.num_trained_tokens} carry loss, {padding:.1%} padding")
    budget = f", at most {config.max_seconds:.0f} s" if config.max_seconds else ""
    _say(f"{num_steps} steps of {config.batch_size} dialogues ({config.num_workers} workers x {accumulation} passes){budget}")
    _say(
        f"{config.method}, ZeRO-{config.zero_stage}, {dtype} because {reason}, {attention} attention, {_threads(config)} threads per worker"
    )
    return WorkOrder(
        config=config,
        base=base,
        tokens=tokens,
        run=directory.name,
        run_directory=directory,
        num_steps=num_steps,
        dtype=dtype,
        attention=attention,
        settings=settings,
    )


def _dtype(config: TrainConfig) -> tuple[str, str]:
    if config.dtype != "auto":
        return config.dtype, "train.dtype says so"
    if config.use_gpu:
        return "bfloat16", "GPUs multiply it"
    if config.zero_stage == 0:
        return "float32", "ZeRO-0 keeps no float32 master weights"
    dtype, reason = choose_dtype("cpu")
    return str(dtype).removeprefix("torch."), reason


def _check_cluster(config: TrainConfig, settings: Settings) -> None:
    found = cluster.connect(settings, num_cpus=max(4, os.cpu_count() or 1))
    bundles: Sequence[dict[str, float]] = [_bundle(config)] * config.num_workers
    cluster.check_placement(found, bundles, wanted_by="training", remedy="Set train.num_workers={num} or add nodes.")
    if found.dashboard_url:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
        _say(f"Ray dashboard: {found.dashboard_url}")


def _bundle(config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})}


def _threads(config: TrainConfig) -> int:
    """The driver's machine stands for its siblings."""
    return config.threads_per_worker or max(1, (os.cpu_count() or 1) // config.num_workers)


def _base(config: FinetuneConfig, registry: Registry) -> Artifact:
    base = registry.resolve(config.base)
    if base.manifest.kind not in {"full", "pruned"}:
        raise UnsupportedModel(
            f"base={config.base} is of kind {base.manifest.kind}; training needs full weights. "
            f"Give its base{f' {base.manifest.base}' if base.manifest.base else ''}, or merge it first."
        )
    return base


def _finished(directory: Path, registry: Registry) -> Artifact | None:
    """The version that this very run has made, unless it was deleted since."""
    state = runs.load(directory)
    if state is None or state.version is None:
        return None
    try:
        return registry.resolve(state.version)
    except RegistryError as error:
        _log.warning("%s was finished, but its version is gone (%s): registering again from its last checkpoint", directory.name, error)
        return None


def _metrics(order: WorkOrder, wall_s: float) -> dict[str, float]:
    steps = curve(order.run_directory)
    last = steps[-max(1, len(steps) // 10) :]
    seconds = sum(step.seconds for step in steps)
    return {
        "train_loss": sum(step.loss for step in last) / len(last),
        "num_steps": float(steps[-1].step),
        "num_tokens": float(sum(step.tokens for step in steps)),
        "train_seconds": seconds,
        "wall_seconds": wall_s,
        "tokens_per_second": sum(step.tokens for step in steps) / max(seconds, 1e-9),
    }


def _say(text: str) -> None:
    print(text, flush=True)
