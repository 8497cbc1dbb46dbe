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

from r1ray import cluster
from r1ray.errors import InvalidValue, RegistryError, TrainingError, UnsupportedModel
from r1ray.model.checkpoint import read_json
from r1ray.model.dequantise import check_trainable
from r1ray.observe.tracking import Run
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train import checkpoint, runs
from r1ray.train.config import FinetuneConfig, TrainConfig
from r1ray.train.export import Result, export
from r1ray.train.objective import objective_of
from r1ray.train.order import WorkOrder, resolve_order, worker_bundles
from r1ray.train.parallel.layout import check_model
from r1ray.train.plot import draw, sparkline
from r1ray.train.progress import Follower, Step, curve, line
from r1ray.train.soft_prompt import resolve_soft_prompt
from r1ray.train.standing import MARK, Standing
from r1ray.types import Artifact

__all__ = ["finetune", "show"]

EXPERIMENT = "finetune"
_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, settings: Settings | None = None) -> Artifact:
    """The registered version that `config` describes; trained now, resumed, or found finished.

    Raises:
        ClusterTooSmall: the workers can never be placed; within a second.
        NothingToTrain, TooManyBadRows: the data cannot be learned from.
        InvalidValue: a soft prompt cannot begin as its text.
        RunInUse: another job trains this run.
        HomeNotShared: nodes have directories of their own at the path of R1RAY_HOME.
        TrainingError: a worker failed more often than `train.max_failures`, the loss diverged, the disk is full.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = settings or Settings()
    _check_cluster(config.train, settings)
    registry = Registry(settings)
    base = _base(config, registry)
    objective = objective_of(config.train.objective)
    rows = objective.read(config)
    config = resolve_soft_prompt(config, rows, base, _say)
    run = runs.run_name(config, base, rows.data_hash)
    directory = settings.checkpoints / run
    with runs.held(directory):
        if config.train.restart:
            runs.forget(directory)
        if (done := _finished(directory, registry)) is not None:
            _say(f"{run} is finished: {done.ref} (train.restart=true trains it again)")
            return done
        material = objective.prepare(rows, base, config, settings)
        return _train(config, resolve_order(config.train, base, material, directory, settings, _say), rows.data_hash, registry)


def show(config: FinetuneConfig, settings: Settings | None = None) -> str:
    """Print `config.show` dialogues as they would be trained; no cluster is needed.

    Raises:
        InvalidValue: the objective trains on something else than dialogues.
    """
    from r1ray.model.load import training_tokenizer
    from r1ray.train.show import shown
    from r1ray.train.tokens import TokenSet

    settings = settings or Settings()
    objective, base = objective_of(config.train.objective), _base(config, Registry(settings))
    material = objective.prepare(objective.read(config), base, config, settings)
    if not isinstance(material, TokenSet):
        raise InvalidValue(
            f"show={config.show} shows dialogues; train.objective={config.train.objective} trains on something else. Set show=0."
        )
    text = shown(material.rows(), training_tokenizer(base), config.show)
    _say(f"{material.told}\n{text}")
    return text


def _train(config: FinetuneConfig, order: WorkOrder, data_hash: str, registry: Registry) -> Artifact:
    from r1ray.train.fit import fit  # here, since Ray Train takes seconds to import and most mistakes show before

    known = runs.load(order.run_directory)
    smaller = known.micro_batch_size if known else None
    with Run(EXPERIMENT, order.run, settings=order.settings, resume_run_id=known.mlflow_run_id if known else None) as tracked:
        tracked.log_params(config.model_dump(mode="json") | {"base": order.base.ref, "data_hash": data_hash})
        state = runs.store(order.run_directory, runs.RunState(mlflow_run_id=tracked.id, dtype=order.dtype, micro_batch_size=smaller))

        def on_steps(steps: list[Step]) -> None:
            _say(line(steps))
            tracked.log_metrics(steps[-1].metrics(), step=steps[-1].step)

        _say(f"starting {config.train.max_workers} workers (each loads torch and the base, about 10 s)")
        started = time.monotonic()
        with Follower(order.run_directory, on_steps, every=config.train.log_every_steps):
            summary = fit(order, say=_say)
        steps = curve(order.run_directory)
        _say(f"loss {sparkline([step.loss for step in steps])}")
        tracked.log_artifact(draw(steps, order.run_directory / "learning_curve.png"))
        metrics = _metrics(order, time.monotonic() - started)
        metrics |= {"peak_memory_mb": float(summary["peak_memory_mb"])} if "peak_memory_mb" in summary else {}
        metrics |= objective_of(config.train.objective).closing(order.run_directory, _say)
        best, standing = _best_checkpoint(order, summary.get("checked", ()))
        if standing.best_loss is not None:
            metrics |= {MARK: standing.best_loss, "best_step": float(standing.best_step)}
            _say(f"step {standing.best_step} is registered, the best of those measured: {MARK} {standing.best_loss:.4f}")
        tracked.log_metrics(metrics)
        result = Result(
            checkpoint=best,
            dtype=order.dtype,
            base=order.base,
            data_hash=data_hash,
            config=config,
            metrics=metrics,
            run_id=tracked.id,
        )
        artifact = export(result, registry)
        runs.store(order.run_directory, runs.load(order.run_directory) or state, version=artifact.ref)
    _say(f"registered {artifact.ref}: {artifact.path}")
    return artifact


def _best_checkpoint(order: WorkOrder, checked: Sequence[str]) -> tuple[Path, Standing]:
    """`checked`: names of those that the workers have read, which is not done twice."""
    checkpoint.sweep(order.run_directory)
    best = checkpoint.best_good(order.run_directory, checked=checked)
    if best is None:
        raise TrainingError(f"Training of {order.run} ended without a checkpoint in {order.run_directory}. This is a defect.")
    return best[0], best[1].standing


def _check_cluster(config: TrainConfig, settings: Settings) -> None:
    found = cluster.connect(settings, num_cpus=max(4, os.cpu_count() or 1))
    cluster.check_placement(found, worker_bundles(config), wanted_by="training", remedy="Set train.num_workers={num} or add nodes.")
    if found.dashboard_url:
        _say(f"Ray dashboard: {found.dashboard_url}")


def _base(config: FinetuneConfig, registry: Registry) -> Artifact:
    base = registry.resolve(config.base)
    if base.manifest.kind not in {"full", "pruned"}:
        raise UnsupportedModel(
            f"base={config.base} is of kind {base.manifest.kind}; training needs full weights. "
            f"Give its base{f' {base.manifest.base}' if base.manifest.base else ''}, or merge it first: r1ray merge {base.ref}"
        )
    check_trainable(base)
    check_model(config.train, read_json(base.path / "config.json"), base.ref)
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
