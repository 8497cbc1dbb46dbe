"""Which sampling settings a model should answer with: measured, not believed.

Every setting answers the same evaluation set. The baseline is the version's present policy, or else the first candidate; it stays unless
another setting is better beyond noise (noise.py) and not much slower. What is chosen is attached to the version as its sampling policy.
The model is loaded once per actor (trial.py); Ray Tune hands it setting after setting.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1ray.cluster import connect
from r1ray.config import config_hash
from r1ray.data.read import read_conversations
from r1ray.errors import TuningError
from r1ray.evaluate.scoring import check_metrics
from r1ray.registry import Registry
from r1ray.registry.known import KnownVersions
from r1ray.settings import Settings
from r1ray.tune.config import RuleConfig, SamplingSweepConfig
from r1ray.tune.noise import Shares, gains
from r1ray.tune.pareto import best_within, front
from r1ray.tune.profiles import PRESENT, PROFILES
from r1ray.tune.record import SweepRecord, sweep_record
from r1ray.tune.report import Setting, print_settings, write_front_plot, write_rows
from r1ray.tune.room import num_side_by_side
from r1ray.types import Artifact, Sampling, SamplingPolicy

__all__ = ["Choice", "candidates", "choose", "judged", "sweep_name", "sweep_sampling"]

_METRICS, _MODES = ["quality", "latency_s"], ["max", "min"]
_MANY_CUT = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The settings with front and choice marked, the latency limit, and in words why the chosen one was taken."""

    settings: list[Setting]
    limit_s: float
    why: str

    @property
    def chosen(self) -> Setting:
        return next(setting for setting in self.settings if setting.is_chosen)


def sweep_sampling(config: SamplingSweepConfig, settings: Settings | None = None) -> list[Setting]:
    """Measure, choose, record and (with `attach`) put the choice beside the model. Gives every measured setting.

    Raises:
        ClusterTooSmall: no actor of the wanted size fits.
        TuningError: the baseline or every setting failed, or `rule.take` names none of them.
    """
    settings = settings or Settings()
    registry = Registry(settings)
    artifact = registry.resolve(config.model)
    data = read_conversations(config.evaluation_data)
    check_metrics(config.quality, data.conversations, where="quality", of=str(config.data.path))
    _tell_size(len(data.conversations), config)
    name = sweep_name(config, artifact, data.data_hash)
    with sweep_record("sweep-sampling", name, settings) as record:
        record.run.log_params({"model": artifact.ref, **config.model_dump(mode="json", exclude={"space"})})
        results = _measure(config, artifact, registry, name)
        measured = [_setting(config, result) for result in results]
        shares = [json.loads(result.metrics["shares"]) for result in results]
        baseline = _baseline([setting.name for setting in measured], config)
        found = judged(measured, shares, baseline, config)
        choice = choose(found, config.rule, num_examples=_origin(results[0])["num_examples"])
        _tell(choice)
        _record(record, choice, settings.checkpoints / name / "result")
        if config.attach:
            _attach(config, registry, artifact, choice, {"sweep": name, "run_id": record.run.id, **_origin(results[0])})
    return choice.settings


def sweep_name(config: SamplingSweepConfig, artifact: Artifact, data_hash: str) -> str:
    """Changes with whatever changes a measurement; not with how the winner is chosen, so that a new rule costs nothing."""
    measured = config.model_copy(update={"rule": RuleConfig(), "attach": True, "task": None, "model": artifact.ref})
    identity = hashlib.sha256(f"{config_hash(measured)}{artifact.manifest.weights_sha256}{data_hash}".encode()).hexdigest()[:12]
    return f"sampling-{artifact.manifest.name}-{identity}"


def candidates(config: SamplingSweepConfig, policy: SamplingPolicy | None) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, settings) to try before any search: what the version answers with now, where it has a policy, then the named ones."""
    named = list(config.first_settings.items())[: config.num_samples]
    if policy is None:
        return named
    present = policy.tasks.get(config.task or "", policy.default)
    return [(PRESENT, present.model_dump(exclude={"seed"})), *named]


def judged(settings: Sequence[Setting], shares: Sequence[Shares], baseline: str, config: SamplingSweepConfig) -> list[Setting]:
    """The settings with what they gain over the baseline, and how much of that is sure. Raises TuningError without the baseline."""
    names = [setting.name for setting in settings]
    if baseline not in names:
        raise TuningError(f"The baseline {baseline!r} was not measured, so nothing can be compared. See its trial's error above.")
    place = names.index(baseline)
    found = gains(shares, place, confidence=config.rule.confidence, seed=config.seed)
    return [
        replace(setting, quality_se=one.quality_se, gain=one.gain, gain_at_least=one.at_least, is_baseline=i == place)
        for i, (setting, one) in enumerate(zip(settings, found, strict=True))
    ]


def choose(settings: Sequence[Setting], rule: RuleConfig, *, num_examples: int) -> Choice:
    """The best of those that are surely better than the baseline and not too slow; without one the baseline.

    Raises:
        TuningError: the baseline has no latency, or `rule.take` names no measured setting.
    """
    base = next((s for s in settings if s.is_baseline and math.isfinite(s.latency_s)), None)
    if base is None:
        raise TuningError("The baseline was not measured, so there is no latency limit. See its trial's error above.")
    limit_s = base.latency_s * (1 + rule.max_slowdown)
    within = f"at most {limit_s:.2f} s per answer ({base.name} + {rule.max_slowdown:.0%})"
    is_enough = num_examples >= rule.min_examples
    better = [s for s in settings if is_enough and not s.is_baseline and s.gain_at_least > 0 and s.latency_s <= limit_s]
    if rule.take is not None:
        chosen = next((s for s in settings if s.name == rule.take), None)
        if chosen is None:
            raise TuningError(f"rule.take is {rule.take!r}; measured were {', '.join(s.name for s in settings)}. Name one of them.")
        why = "taken by rule.take, whatever the figures say"
    elif better:
        chosen = better[best_within([s.quality for s in better], [s.latency_s for s in better], limit_s)]
        sure = f"better than {base.name} by {chosen.gain:.3f}, surely by {chosen.gain_at_least:.3f} ({rule.confidence:.0%})"
        why = f"{sure}; best quality with {within}"
    elif not is_enough:
        chosen, why = base, f"the baseline stays: {num_examples} examples are fewer than rule.min_examples={rule.min_examples}"
    else:
        chosen, why = (
            base,
            f"the baseline stays: on {num_examples} examples none is surely better ({rule.confidence:.0%}) with {within}",
        )
    on_front = set(front([(s.quality, s.latency_s) for s in settings], ("max", "min")))
    marked = [replace(s, on_front=i in on_front, is_chosen=s.name == chosen.name) for i, s in enumerate(settings)]
    return Choice(settings=marked, limit_s=limit_s, why=why)


def _baseline(measured: Sequence[str], config: SamplingSweepConfig) -> str:
    return PRESENT if PRESENT in measured else next(iter(config.first_settings))


def _tell_size(num_examples: int, config: SamplingSweepConfig) -> None:
    """Before minutes are spent: whether so few dialogues can change anything."""
    if num_examples < config.rule.min_examples:
        cause = f"limit={config.limit}" if config.limit == num_examples else f"{config.data.path} holds no more"
        _log.warning(
            "%d dialogues (%s) are fewer than rule.min_examples=%d: settings are measured, and the baseline stays whatever they show. "
            "Give more held-out dialogues, or take one by hand with rule.take",
            num_examples,
            cause,
            config.rule.min_examples,
        )


def _tell(choice: Choice) -> None:
    print_settings(choice.settings)
    chosen = choice.chosen
    print(f"chosen: {chosen.name}: quality {chosen.quality:.3f}, {chosen.latency_s:.2f} s per answer; {choice.why}", flush=True)
    if (cut := chosen.metrics.get("truncated_share", 0.0)) > _MANY_CUT:
        print(
            f"{cut:.0%} of its answers were cut at max_tokens={chosen.sampling.max_tokens}, and would be when served: set base.max_tokens "
            "(or space.max_tokens) higher if your answers are longer",
            flush=True,
        )


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

    first = candidates(config, artifact.policy)
    searcher = CandidatesFirst(first, optuna_search(config.space, _METRICS, _MODES, seed=config.seed))
    sweep = Sweep(
        name=name,
        storage=settings.checkpoints,
        num_samples=config.num_samples + (first[0][0] == PRESENT),
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
    sources = dict.fromkeys(config.first_settings, "yours") | {p.name: p.source for p in PROFILES}
    sources[PRESENT] = "the version's policy"
    metrics = result.metrics
    return Setting(
        name=name,
        sampling=Sampling.model_validate(config.base.model_dump() | values),
        quality=float(metrics["quality"]),
        latency_s=float(metrics["latency_s"]),
        source=sources.get(name, "Optuna"),
        metrics={key: float(value) for key, value in metrics["scores"].items()},
    )


def _origin(result: Any) -> dict[str, Any]:
    return {"data_hash": result.metrics["data_hash"], "num_examples": int(result.metrics["num_examples"])}


def _record(record: SweepRecord, choice: Choice, directory: Path) -> None:
    files = write_rows([setting.row() for setting in choice.settings], directory, "settings")
    files.append(write_front_plot(choice.settings, choice.limit_s, directory / "front.png"))
    for setting in choice.settings:
        metrics = {**setting.figures, **setting.metrics}
        record.trial(setting.name, setting.name, {**setting.sampling.model_dump(), "source": setting.source}, metrics)
        if setting.is_chosen:
            record.run.log_metrics(metrics)
    for file in files:
        record.run.log_artifact(file)
    print(f"table, rows and plot: {directory}", flush=True)


def _attach(config: SamplingSweepConfig, registry: Registry, artifact: Artifact, choice: Choice, origin: dict[str, Any]) -> None:
    """As the version's default, or for one task beside what is there."""
    chosen = choice.chosen
    sampling = chosen.sampling.model_copy(update={"seed": None})
    known = artifact.policy or SamplingPolicy()
    provenance = {**origin, "rule": choice.why, "setting": chosen.name, **chosen.figures}
    changed = {"default": sampling} if config.task is None else {"tasks": {**known.tasks, config.task: sampling}}
    policy = known.model_copy(update={**changed, "provenance": {**known.provenance, config.task or "default": provenance}})
    registry.attach_policy(artifact.ref, policy)
    print(f"attached to {artifact.ref} as its {'default' if config.task is None else config.task!r} sampling policy", flush=True)
