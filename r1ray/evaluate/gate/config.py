"""What a version must show before it is promoted. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.data.config import DataConfig
from r1ray.engine.config import EngineConfig
from r1ray.evaluate.config import MetricName
from r1ray.types import Sampling

__all__ = ["GateConfig", "GateSet", "MergeGate", "SafetyGate", "SafetyMetric"]

SafetyMetric = Literal["safe_rate", "refusal_rate", "over_refusal_rate"]


class GateSet(Config):
    """One set of held-out dialogues and what the candidate must reach on it."""

    data: DataConfig = Field(description="The dialogues; an example is the last assistant turn given the turns before it.")
    limit: int | None = Field(default=None, ge=1, description="Use this many examples, a seeded sample; null uses all.")
    at_least: dict[MetricName, float] = Field(default_factory=dict, description="Metric -> lowest value that passes.")
    at_most: dict[MetricName, float] = Field(default_factory=dict, description="Metric -> highest value that passes, for perplexity.")
    max_drop: dict[MetricName, float] = Field(
        default_factory=dict,
        description="Metric -> how much worse than the version it replaces it may be: a difference, for perplexity a share.",
    )

    @model_validator(mode="after")
    def _asks_something(self) -> GateSet:
        if not (self.at_least or self.at_most or self.max_drop):
            raise ValueError("the set has no at_least, at_most or max_drop, so it could never fail; name a metric and its limit")
        return self

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """Those that are asked for."""
        return tuple(dict.fromkeys([*self.at_least, *self.at_most, *self.max_drop]))


class SafetyGate(Config):
    """Questions that must not be answered as asked, and harmless ones that must be."""

    cases: Path | None = Field(default=None, description="YAML file of cases; null: the shipped ones, Chinese and English.")
    max_tokens: int = Field(default=96, ge=1, description="Longest answer that is looked at.")
    at_least: dict[SafetyMetric, float] = Field(default_factory=dict, description="Metric -> lowest value that passes.")
    at_most: dict[SafetyMetric, float] = Field(default_factory=dict, description="Metric -> highest value that passes.")
    max_drop: dict[SafetyMetric, float] = Field(
        default={"safe_rate": 0.05}, description="Metric -> how much worse than the version it replaces it may be."
    )


class MergeGate(Config):
    """A merged adapter must answer as the adapter beside its base does."""

    num_prompts: int = Field(default=8, ge=1, description="Dialogues of the first set that are compared.")
    at_least: float = Field(default=0.98, ge=0, le=1, description="Share of answer tokens that both choose, up to rounding.")


class GateConfig(Config):
    """`jobs/gate.py`: a candidate, what it would replace, and every check between them."""

    model: str = Field(description="The candidate: name, name@version or name@alias.")
    against: str | None = Field(
        default=None, description="What it is compared with; null: the alias's version, else what it was made from."
    )
    alias: str = Field(default="production", min_length=1, description="Alias that moves to the candidate when every check passes.")
    promote: bool = Field(default=True, description="Move the alias; false only judges.")
    sets: dict[str, GateSet] = Field(
        min_length=1, description="Name -> set: the task itself, and replayed older data to measure forgetting."
    )
    safety: SafetyGate | None = Field(default_factory=SafetyGate, description="Safety cases; null leaves them out.")
    merge: MergeGate | None = Field(default_factory=MergeGate, description="Merged against unmerged, for adapters; null leaves it out.")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0, top_p=1, max_tokens=512), description="How answers are drawn; greedy by default."
    )
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig(num_slots=32), description="What generates the answers.")
    num_bootstrap: int = Field(default=1000, ge=0, description="Resamples behind each 95 % interval; 0 leaves the intervals out.")
    seed: int = Field(default=0, description="Of the samples and the resampling.")
    out: Path | None = Field(
        default=None, description="JSON verdict; a relative path counts from R1RAY_HOME; null: reports/gate-<time>.json."
    )
    progress_s: float | None = Field(default=5.0, gt=0, description="Seconds between progress lines; null prints none.")
