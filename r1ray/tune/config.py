"""Settings of the two sweeps. Imports neither torch nor ray.

The hyperparameter sweep nests a whole training config, whose schema is the train package's; the sampling sweep measures a model.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.data.config import DataConfig
from r1ray.engine.config import EngineConfig
from r1ray.tune.profiles import PROFILES
from r1ray.tune.space import Choice, Space, Uniform, bounds, check_keys
from r1ray.types import Sampling

__all__ = ["RuleConfig", "SamplingSweepConfig"]

_SPACE: Space = {
    "temperature": Uniform(type="uniform", low=0.0, high=1.0),
    "top_p": Uniform(type="uniform", low=0.5, high=1.0),
    "top_k": Choice(type="choice", values=(0, 20, 40)),
    "repetition_penalty": Uniform(type="uniform", low=1.0, high=1.3),
    "frequency_penalty": Uniform(type="uniform", low=0.0, high=1.0),
    "presence_penalty": Uniform(type="uniform", low=0.0, high=0.8),
    "max_tokens": Choice(type="choice", values=(64, 96, 128)),
}


class RuleConfig(Config):
    """How one setting is taken from the front: the best quality within a latency limit."""

    max_slowdown: float = Field(
        default=0.2, ge=0, description="A setting may take this share longer than the baseline (the first candidate); 0.2 is 20 %."
    )


class SamplingSweepConfig(Config):
    """Settings of jobs/sweep_sampling.py."""

    model: str = Field(description="Registry reference: name, name@alias or name@version.")
    data: DataConfig = Field(description="Evaluation set; each dialogue's last assistant turn is generated and compared.")
    limit: int | None = Field(default=64, ge=1, description="Dialogues per setting, a seeded sample; null uses all.")
    quality: tuple[str, ...] = Field(
        default=("exact_match", "intent_accuracy", "entity_f1", "rouge_l"),
        min_length=1,
        description="Quality is the mean of those of these metrics that the evaluation reports.",
    )
    candidates: tuple[str, ...] = Field(
        default=tuple(p.name for p in PROFILES), description="Named profiles tried first, in this order; the first is the baseline."
    )
    base: Sampling = Field(default=Sampling(max_tokens=128), description="Values of whatever a candidate or the space does not set.")
    space: Space = Field(default=_SPACE, description="Sampling fields that Optuna searches after the candidates; {} ends after them.")
    num_samples: int = Field(default=20, ge=1, description="Settings tried in all, candidates included.")
    rule: RuleConfig = Field(default_factory=RuleConfig, description="How the winner is taken from the front.")
    attach: bool = Field(default=True, description="Attach the winner to the version as its sampling policy.")
    task: str | None = Field(default=None, description="Attach it for this task only; null makes it the version's default.")
    num_actors: int = Field(default=1, ge=1, description="Copies of the model that measure side by side; they share the machine's cores.")
    cpus_per_actor: float = Field(default=1, gt=0, description="Logical CPUs that one actor reserves.")
    gpus_per_actor: float = Field(default=0, ge=0, description="GPUs that one actor reserves.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="The engine that serves the model while it is measured.")
    seed: int = Field(default=0, description="Of the search and of every generation.")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingSweepConfig:
        known = [p.name for p in PROFILES]
        if unknown := [name for name in self.candidates if name not in known]:
            raise ValueError(f"unknown candidates {', '.join(unknown)}; there are {', '.join(known)}")
        if not self.candidates:
            raise ValueError("at least one candidate is needed: the first is the baseline of the latency limit")
        check_keys(self.space, Sampling)
        for key, distribution in self.space.items():
            for value in bounds(distribution):
                Sampling.model_validate({key: value})
        return self
