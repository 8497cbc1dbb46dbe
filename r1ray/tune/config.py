"""Settings of the two sweeps. Imports neither torch nor ray.

The hyperparameter sweep nests a whole training config, whose schema is the train package's; the sampling sweep measures a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.data.config import DataConfig
from r1ray.engine.config import EngineConfig
from r1ray.evaluate.config import MetricName
from r1ray.train.config import FinetuneConfig
from r1ray.tune.profiles import PRESENT, PROFILES
from r1ray.tune.space import Choice, Space, Uniform, assign, bounds, check_keys
from r1ray.types import Sampling

__all__ = ["AshaConfig", "CandidateConfig", "HyperparameterSweepConfig", "RuleConfig", "SamplingSweepConfig"]

_SPACE: Space = {
    "temperature": Uniform(type="uniform", low=0.0, high=1.0),
    "top_p": Uniform(type="uniform", low=0.5, high=1.0),
    "top_k": Choice(type="choice", values=(0, 20, 40)),
    "repetition_penalty": Uniform(type="uniform", low=1.0, high=1.3),
    "frequency_penalty": Uniform(type="uniform", low=0.0, high=1.0),
    "presence_penalty": Uniform(type="uniform", low=0.0, high=0.8),
    "max_tokens": Choice(type="choice", values=(128, 256, 512)),
}


class RuleConfig(Config):
    """How one setting is taken: the best quality within a latency limit, of those that are better than the baseline beyond noise."""

    max_slowdown: float = Field(
        default=0.2, ge=0, description="A setting may take this share longer per answer than the baseline; 0.2 is 20 %."
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="How sure it must be that a setting is better than the baseline, all of them considered."
    )
    min_examples: int = Field(default=100, ge=1, description="With fewer dialogues the baseline stays, whatever the others seem to be.")
    take: str | None = Field(default=None, description="Take this setting by its name, whatever the figures say; null follows the rule.")


class CandidateConfig(Config):
    """A setting of your own to try, beside the named profiles."""

    name: str = Field(min_length=1, description="How tables call it.")
    settings: dict[str, Any] = Field(min_length=1, description="Sampling fields that it sets; the rest is base's.")

    @model_validator(mode="after")
    def _valid(self) -> CandidateConfig:
        check_keys(self.settings, Sampling, where=f"the settings of candidate {self.name}")
        Sampling.model_validate(self.settings)
        if self.name == PRESENT or self.name.startswith("search-") or self.name in (p.name for p in PROFILES):
            raise ValueError(f"candidate name {self.name!r} is taken; call it otherwise")
        return self


class SamplingSweepConfig(Config):
    """Settings of jobs/sweep_sampling.py."""

    model: str = Field(description="Registry reference: name, name@alias or name@version.")
    data: DataConfig = Field(description="Evaluation set; each dialogue's last assistant turn is generated and compared.")
    limit: int | None = Field(default=200, ge=1, description="Dialogues per setting, a seeded sample; null uses all.")
    quality: tuple[MetricName, ...] = Field(
        default=("exact_match", "intent_accuracy", "entity_f1", "rouge_l"),
        min_length=1,
        description="Quality is the mean of those of these metrics that the evaluation reports.",
    )
    length_margin: float | None = Field(
        default=None, gt=0, description="Cut answers at this multiple of the gold answer's tokens plus 16; null lets max_tokens decide."
    )
    candidates: tuple[str | CandidateConfig, ...] = Field(
        default=tuple(p.name for p in PROFILES),
        description="Tried first: names of profiles, or your own; the first is the baseline, unless the version has a policy already.",
    )
    base: Sampling = Field(default=Sampling(), description="Values of whatever a candidate or the space does not set.")
    space: Space = Field(default=_SPACE, description="Sampling fields that Optuna searches after the candidates; {} ends after them.")
    num_samples: int = Field(
        default=20, ge=1, description="Settings tried in all, candidates included; the version's present policy comes on top."
    )
    rule: RuleConfig = Field(default_factory=RuleConfig, description="How the winner is taken.")
    attach: bool = Field(default=True, description="Attach the winner to the version as its sampling policy.")
    task: str | None = Field(default=None, description="Attach it for this task only; null makes it the version's default.")
    num_actors: int = Field(default=1, ge=1, description="Copies of the model that measure side by side; they share the machine's cores.")
    cpus_per_actor: float = Field(default=1, gt=0, description="Logical CPUs that one actor reserves, beside engine.stage_cpus.")
    gpus_per_actor: float = Field(default=0, ge=0, description="GPUs that one actor reserves, beside engine.stage_gpus.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="The engine that serves the model while it is measured.")
    seed: int = Field(default=0, description="Of the search and of every generation.")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingSweepConfig:
        known = [p.name for p in PROFILES]
        if unknown := [each for each in self.candidates if isinstance(each, str) and each not in known]:
            raise ValueError(f"unknown candidates {', '.join(unknown)}; there are {', '.join(known)}")
        if "perplexity" in self.quality:
            raise ValueError("quality cannot hold perplexity, which no sampling setting changes; name metrics of answers")
        if len(set(self.first_settings)) < len(self.candidates):
            raise ValueError("two candidates have the same name; call one otherwise")
        if not self.candidates:
            raise ValueError("at least one candidate is needed: the first is the baseline of the latency limit")
        check_keys(self.space, Sampling)
        for key, distribution in self.space.items():
            for value in bounds(distribution):
                Sampling.model_validate({key: value})
        return self

    @property
    def first_settings(self) -> dict[str, Mapping[str, Any]]:
        """Name -> fields of every candidate, in order."""
        profiles = {p.name: p.fields for p in PROFILES}
        return {
            (each if isinstance(each, str) else each.name): (profiles[each] if isinstance(each, str) else each.settings)
            for each in self.candidates
        }

    @property
    def trial_bundles(self) -> list[dict[str, float]]:
        """What one actor reserves: its own bundle, of which it holds all; one for the other tensor ranks of its stage, where the model
        is split so; one per further stage, or vLLM's.
        """
        own = {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor}
        bundles = [own, self.engine.own_bundle, *self.engine.actor_bundles]
        wanted = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
        return [bundle for bundle in wanted if bundle]

    @property
    def evaluation_data(self) -> DataConfig:
        """`data` with this sweep's limit."""
        return self.data.model_copy(update={"limit": self.limit or self.data.limit})


class AshaConfig(Config):
    """Asynchronous successive halving (arXiv 1810.05934): at each rung only the best share of the trials goes on."""

    grace_steps: int = Field(default=10, ge=1, description="No trial is stopped before this many optimizer steps: the first rung.")
    reduction_factor: float = Field(default=3, gt=1, description="One in so many goes on at a rung; the next rung is so many times later.")


class HyperparameterSweepConfig(Config):
    """Settings of jobs/sweep_hyperparameters.py."""

    finetune: FinetuneConfig = Field(description="The training that every trial runs, as in jobs/configs/finetune_*.yaml.")
    space: Space = Field(min_length=1, description="Dotted keys of `finetune` -> distribution, e.g. train.learning_rate.")
    num_samples: int = Field(default=12, ge=1, description="Trainings in all.")
    include_base: bool = Field(default=True, description="The first trial is `finetune` unchanged: what the others are compared with.")
    eval_share: float = Field(default=0.1, gt=0, lt=1, description="Share of the dialogues held out of every training.")
    eval_limit: int = Field(default=64, ge=1, description="At most so many of them give the eval loss, per token of their answers.")
    asha: AshaConfig | None = Field(default_factory=AshaConfig, description="Early stopping by training loss; null trains all to the end.")
    max_concurrent: int | None = Field(default=None, ge=1, description="Trials side by side; null: as many as the cluster can hold.")
    seed: int = Field(default=0, description="Of the search and of the split; the training's own seed is finetune.train.seed.")

    @model_validator(mode="after")
    def _consistent(self) -> HyperparameterSweepConfig:
        train = self.finetune.train
        if train.objective not in ("sft", "distill") or (train.objective == "distill" and train.distill.mode == "texts"):
            raise ValueError(
                f"finetune.train.objective is {train.objective}: the sweep compares losses on dialogues, which objective sft has, and "
                "distill with mode logits; take one of them"
            )
        if any(key.startswith("train.objective") or key == "train.distill.mode" for key in self.space):
            raise ValueError("space cannot hold train.objective or train.distill.mode: losses of different ones do not compare")
        check_keys(self.space, FinetuneConfig)
        for key, distribution in self.space.items():
            for value in bounds(distribution):
                self.trial({key: value})
        return self

    def trial(self, values: Mapping[str, Any]) -> FinetuneConfig:
        """`finetune` with the dotted keys of one trial set."""
        return FinetuneConfig.model_validate(assign(self.finetune.model_dump(), values))
