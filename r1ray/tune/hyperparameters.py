"""Which training settings learn best: Ray Tune over real trainings, Optuna proposing, ASHA stopping the hopeless.

The result is a config file that jobs/finetune.py takes, a table, and an MLflow run with a child per trial. Registers no model: the
winner is trained on all of the data by jobs/finetune.py.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

from r1ray import cluster
from r1ray.config import config_hash, dump_yaml
from r1ray.errors import TuningError
from r1ray.model.dequantise import check_trainable
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train.config import FinetuneConfig
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.heldout import divide
from r1ray.tune.record import SweepRecord, sweep_record
from r1ray.tune.report import print_rows, write_rows
from r1ray.tune.room import num_side_by_side

__all__ = ["num_concurrent", "sweep_hyperparameters"]


def sweep_hyperparameters(config: HyperparameterSweepConfig, settings: Settings | None = None) -> FinetuneConfig:
    """The best training config found; also written as YAML.

    Raises:
        ClusterTooSmall: not even one trial fits.
        NothingToTrain: too few dialogues to hold some out.
        TuningError: no trial reached its end.
        UnsupportedModel: the base is quantised.
    """
    settings = settings or Settings()
    base = Registry(settings).resolve(config.finetune.base)
    check_trainable(base)
    kept, held = divide(config.finetune.data, config)
    print(f"{len(kept.conversations)} dialogues to train on, {len(held.conversations)} held out", flush=True)
    identity = hashlib.sha256(f"{config_hash(config)}{base.manifest.weights_sha256}{kept.data_hash}".encode()).hexdigest()[:12]
    name = f"hyperparameters-{config.finetune.name}-{identity}"
    with sweep_record("sweep-hyperparameters", name, settings) as record:
        record.run.log_params({"base": base.ref, **config.model_dump(mode="json", exclude={"space"})})
        results = _search(config, settings, name)
        rows = sorted((_row(config, result) for result in results), key=lambda row: (_missing_last(row["eval_loss"]), row["loss"]))
        print_rows([_shown_row(row) for row in rows], "Trainings, best first")
        best = rows[0]
        if not math.isfinite(best["eval_loss"]):
            raise TuningError(f"None of {len(rows)} trainings ended with a finite loss. Set asha=null or another space.")
        chosen = config.trial({key: best[key] for key in config.space})
        _record(record, config, rows, chosen, settings.checkpoints / name / "result")
    return chosen


def num_concurrent(config: HyperparameterSweepConfig, found: cluster.Cluster) -> int:
    """Most trials whose drivers and workers all find room at once.

    Raises:
        ClusterTooSmall: not even one.
    """
    from r1ray.train.order import worker_bundles
    from r1ray.tune.training import DRIVER_CPUS

    one = [{"CPU": DRIVER_CPUS}, *worker_bundles(config.finetune.train)]
    most = config.max_concurrent or config.num_samples
    return num_side_by_side(found, one, most=most, wanted_by="the sweep", wanted_by_one="one training of the sweep")


def _search(config: HyperparameterSweepConfig, settings: Settings, name: str) -> list[Any]:
    found = cluster.connect(settings)
    num_trials = num_concurrent(config, found)
    print(
        f"{num_trials} trainings at a time: that is what the cluster holds, at most {config.max_concurrent or config.num_samples}",
        flush=True,
    )
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from r1ray.tune.launch import Sweep, run_sweep
    from r1ray.tune.search import CandidatesFirst, optuna_search
    from r1ray.tune.training import DRIVER_CPUS, train_trial

    searcher = CandidatesFirst([("base", {})] * config.include_base, optuna_search(config.space, "eval_loss", "min", seed=config.seed))
    scheduler = config.asha and ASHAScheduler(
        time_attr="step",
        metric="loss",
        mode="min",
        max_t=10**9,  # a training ends by itself, after its eval loss
        grace_period=config.asha.grace_steps,
        reduction_factor=config.asha.reduction_factor,
    )
    sweep = Sweep(
        name=name,
        storage=settings.checkpoints,
        num_samples=config.num_samples,
        max_concurrent=num_trials,
        show=_shown,
    )
    runs = settings.checkpoints / f"{name}-runs"
    trainable = tune.with_parameters(train_trial, sweep=config, runs=runs, num_concurrent=num_trials, settings=settings)
    outcome = run_sweep(sweep, tune.with_resources(trainable, {"CPU": DRIVER_CPUS}), searcher, scheduler)
    shutil.rmtree(runs, ignore_errors=True)
    print(f"{len(outcome.results)} trainings in {outcome.seconds:.0f} s{' (resumed)' if outcome.resumed else ''}", flush=True)
    return [result for result in outcome.results if result.error is None and "loss" in (result.metrics or {})]


def _shown(metrics: dict[str, Any]) -> str:
    loss = f"loss {metrics.get('loss', math.nan):.4f} at step {metrics.get('step', 0)}"
    return f"eval loss {metrics['eval_loss']:.4f}, {loss}" if "eval_loss" in metrics else f"stopped early, {loss}"


def _row(config: HyperparameterSweepConfig, result: Any) -> dict[str, Any]:
    metrics = result.metrics
    own = {"name": result.config["name"], "eval_loss": float(metrics.get("eval_loss", math.nan)), "loss": float(metrics["loss"])}
    tree = config.trial(result.config["values"]).model_dump()
    searched = {key: reduce(lambda node, part: node[part], key.split("."), tree) for key in config.space}
    return {**own, "steps": int(metrics["step"]), "seconds": float(metrics["time_total_s"]), **searched}


def _shown_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "eval_loss": row["eval_loss"] if math.isfinite(row["eval_loss"]) else "stopped"}


def _missing_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _record(record: SweepRecord, config: HyperparameterSweepConfig, rows: list[dict[str, Any]], chosen: FinetuneConfig, out: Path) -> None:
    files = write_rows(
        [{**row, "eval_loss": row["eval_loss"] if math.isfinite(row["eval_loss"]) else None} for row in rows], out, "trainings"
    )
    best = out / "best.yaml"
    best.write_text(f"# jobs/finetune.py: the best of {len(rows)} trainings\n{dump_yaml(chosen)}", encoding="utf-8")
    for row in rows:
        metrics = {key: row[key] for key in ("eval_loss", "loss", "steps", "seconds") if math.isfinite(row[key])}
        record.trial(row["name"], row["name"], {key: row[key] for key in config.space}, metrics)
    record.run.log_metrics({"eval_loss": rows[0]["eval_loss"]})
    for file in [*files, best]:
        record.run.log_artifact(file)
    print(f"best: {rows[0]['name']}, eval loss {rows[0]['eval_loss']:.4f}\ntrain it: python jobs/finetune.py --config {best}", flush=True)
