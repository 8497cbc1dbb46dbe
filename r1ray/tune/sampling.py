"""Which sampling settings a model should answer with: measured, not believed.

Every setting answers the same evaluation set; quality and latency give the Pareto front, a stated rule takes one, and that one is
attached to the version as its sampling policy. The model is loaded once per actor (trial.py); Ray Tune hands it setting after setting.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

from r1ray.cluster import connect
from r1ray.config import config_hash
from r1ray.data.read import read_conversations
from r1ray.errors import TuningError
from r1ray.registry import Registry
from r1ray.registry.known import KnownVersions
from r1ray.settings import Settings
from r1ray.tune.config import RuleConfig, SamplingSweepConfig
from r1ray.tune.pareto import best_within, front
from r1ray.tune.profiles import PROFILES
from r1ray.tune.record import SweepRecord, sweep_record
from r1ray.tune.report import Setting, print_settings, write_front_plot, write_rows
from r1ray.tune.room import num_side_by_side
from r1ray.types import Artifact, Sampling, SamplingPolicy

__all__ = ["choose", "sweep_sampling"]

_METRICS, _MODES = ["quality", "latency_s"], ["max", "min"]


def sweep_sampling(config: SamplingSweepConfig, settings: Settings | None = None) -> list[Setting]:
    """Measure, choose, record and (with `attach`) put the choice beside the model. Gives every measured setting.

    Raises:
        ClusterTooSmall: no actor of the wanted size fits.
        TuningError: the baseline or every setting failed.
    """
    settings = settings or Settings()
    registry = Registry(settings)
    artifact = registry.resolve(config.model)
    data = read_conversations(config.evaluation_data)
    name = sweep_name(config, artifact, data.data_hash)
    with sweep_record("sweep-sampling", name, settings) as record:
        record.run.log_params({"model": artifact.ref, **config.model_dump(mode="json", exclude={"space"})})
        results = _measure(config, artifact, registry, name)
        found, limit_s = choose([_setting(config, result) for result in results], config.candidates[0], config.rule)
        print_settings(found)
        chosen = next(setting for setting in found if setting.is_chosen)
        rule = f"best quality with at most {limit_s:.2f} s per answer (baseline {config.candidates[0]} + {config.rule.max_slowdown:.0%})"
        print(f"chosen: {chosen.name}: quality {chosen.quality:.3f}, {chosen.latency_s:.2f} s per answer; {rule}", flush=True)
        _record(record, found, limit_s, settings.checkpoints / name / "result")
        if config.attach:
            _attach(config, registry, artifact, chosen, {"sweep": name, "run_id": record.run.id, "rule": rule, **_origin(results[0])})
    return found


def sweep_name(config: SamplingSweepConfig, artifact: Artifact, data_hash: str) -> str:
    """Changes with whatever changes a measurement; not with how the winner is chosen, so that a new rule costs nothing."""
    measured = config.model_copy(update={"rule": RuleConfig(), "attach": True, "task": None, "model": artifact.ref})
    identity = hashlib.sha256(f"{config_hash(measured)}{artifact.manifest.weights_sha256}{data_hash}".encode()).hexdigest()[:12]
    return f"sampling-{artifact.manifest.name}-{identity}"


def choose(settings: list[Setting], baseline: str, rule: RuleConfig) -> tuple[list[Setting], float]:
    """The settings with front and choice marked, and the latency limit in seconds.

    Raises:
        TuningError: the baseline was not measured.
    """
    base = next((s for s in settings if s.name == baseline and math.isfinite(s.latency_s)), None)
    if base is None:
        raise TuningError(f"The baseline {baseline!r} was not measured, so there is no latency limit. See its trial's error above.")
    limit_s = base.latency_s * (1 + rule.max_slowdown)
    on_front = set(front([(s.quality, s.latency_s) for s in settings], ("max", "min")))
    chosen = best_within([s.quality for s in settings], [s.latency_s for s in settings], limit_s)
    return [replace(s, on_front=i in on_front, is_chosen=i == chosen) for i, s in enumerate(settings)], limit_s


def _measure(config: SamplingSweepConfig, artifact: Artifact, registry: Registry, name: str) -> list[Any]:
    """The finished trials' results, in order."""
    settings = registry.settings
    num_actors = num_side_by_side(
        connect(settings),
        config.trial_bundles,
        most=config.num_actors,
        wanted_by="the sampling sweep",
        wanted_by_one="an actor of the sampling sweep",
        remedy="Set cpus_per_actor and gpus_per_actor lower",
    )
    if num_actors < config.num_actors:
        print(f"num_actors={num_actors} instead of {config.num_actors}: that is what the cluster holds", flush=True)
    from ray import tune

    from r1ray.tune.launch import Sweep, run_sweep
    from r1ray.tune.search import CandidatesFirst, optuna_search
    from r1ray.tune.trial import SamplingTrial

    sources = {p.name: p for p in PROFILES}
    candidates = [(each, sources[each].fields) for each in config.candidates[: config.num_samples]]
    searcher = CandidatesFirst(candidates, optuna_search(config.space, _METRICS, _MODES, seed=config.seed))
    sweep = Sweep(
        name=name,
        storage=settings.checkpoints,
        num_samples=config.num_samples,
        max_concurrent=num_actors,
        show=_shown,
        reuse_actors=True,
    )
    known = KnownVersions(registry.lineage(artifact.ref), settings)
    trainable = tune.with_parameters(SamplingTrial, sweep=config, artifact=artifact, registry=known)
    # the engine's own actors find their bundles beside the trial's: its children cannot leave its placement group
    outcome = run_sweep(sweep, tune.with_resources(trainable, tune.PlacementGroupFactory(config.trial_bundles)), searcher)
    print(f"{len(outcome.results)} settings in {outcome.seconds:.0f} s{' (resumed)' if outcome.resumed else ''}", flush=True)
    return [result for result in outcome.results if result.error is None and "quality" in (result.metrics or {})]


def _shown(metrics: dict[str, Any]) -> str:
    return f"quality {metrics.get('quality', math.nan):.3f}, {metrics.get('latency_s', math.nan):.2f} s per answer"


def _setting(config: SamplingSweepConfig, result: Any) -> Setting:
    name, values = result.config["name"], result.config["values"]
    source = next((p.source for p in PROFILES if p.name == name), "Optuna")
    metrics = result.metrics
    return Setting(
        name=name,
        sampling=Sampling.model_validate(config.base.model_dump() | values),
        quality=float(metrics["quality"]),
        latency_s=float(metrics["latency_s"]),
        source=source,
        metrics={key: float(value) for key, value in metrics["scores"].items()},
    )


def _origin(result: Any) -> dict[str, Any]:
    return {"data_hash": result.metrics["data_hash"], "num_examples": int(result.metrics["num_examples"])}


def _record(record: SweepRecord, found: list[Setting], limit_s: float, directory: Any) -> None:
    files = write_rows([setting.row() for setting in found], directory, "settings")
    files.append(write_front_plot(found, limit_s, directory / "front.png"))
    for setting in found:
        metrics = {"quality": setting.quality, "latency_s": setting.latency_s, **setting.metrics}
        record.trial(setting.name, setting.name, {**setting.sampling.model_dump(), "source": setting.source}, metrics)
        if setting.is_chosen:
            record.run.log_metrics(metrics)
    for file in files:
        record.run.log_artifact(file)
    print(f"table, rows and plot: {directory}", flush=True)


def _attach(config: SamplingSweepConfig, registry: Registry, artifact: Artifact, chosen: Setting, origin: dict[str, Any]) -> None:
    """As the version's default, or for one task beside what is there."""
    sampling = chosen.sampling.model_copy(update={"seed": None})
    known = artifact.policy or SamplingPolicy()
    provenance = {**origin, "setting": chosen.name, "quality": chosen.quality, "latency_s": chosen.latency_s}
    changed = {"default": sampling} if config.task is None else {"tasks": {**known.tasks, config.task: sampling}}
    policy = known.model_copy(update={**changed, "provenance": {**known.provenance, config.task or "default": provenance}})
    registry.attach_policy(artifact.ref, policy)
    print(f"attached to {artifact.ref} as its {'default' if config.task is None else config.task!r} sampling policy", flush=True)
