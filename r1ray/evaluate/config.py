"""What an evaluation measures and how. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from r1ray.config import Config
from r1ray.data.config import DataConfig
from r1ray.engine.config import EngineConfig
from r1ray.types import Sampling

__all__ = ["EvaluateConfig", "MetricName"]

MetricName = Literal[
    "intent_accuracy", "entity_f1", "exact_match", "format_ok", "rouge_1", "rouge_2", "rouge_l", "bleu", "citation_rate", "perplexity"
]


class EvaluateConfig(Config):
    """One or more models over one set of dialogues; the first model is what the others are compared with."""

    models: tuple[str, ...] = Field(default=(), description="Registry references, e.g. smollm2-135m-instruct, bank-assistant@3.")
    data: DataConfig = Field(description="The held-out dialogues; an example is the last assistant turn given the turns before it.")
    limit: int | None = Field(default=None, ge=1, description="Use this many examples, a seeded sample; null uses all.")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0, top_p=1, max_tokens=512), description="How answers are drawn; greedy by default."
    )
    length_margin: float | None = Field(
        default=1.5,
        gt=0,
        description="Answers are cut at this multiple of their gold answer's tokens plus 16, so that a rambling model costs no minutes; "
        "null leaves sampling.max_tokens alone.",
    )
    metrics: tuple[MetricName, ...] | None = Field(default=None, description="Which to compute; null takes all that the data allows.")
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig(num_slots=32), description="What generates the answers.")
    perplexity_examples: int | None = Field(
        default=48, ge=1, description="Perplexity on a seeded sample of so many examples, since it costs a pass over each; null: all."
    )
    num_bootstrap: int = Field(default=1000, ge=0, description="Resamples behind each 95 % interval; 0 leaves the intervals out.")
    seed: int = Field(default=0, description="Of the resampling and the perplexity's sample.")
    cache_salt: str = Field(
        default="", description="Answers share computed prefixes only with those of the same salt: a sweep gives each setting its own."
    )
    annotate: bool = Field(default=True, description="Write the metrics to the version's tags in the registry.")
    out: Path | None = Field(
        default=None, description="JSON report; a relative path counts from R1RAY_HOME; null: reports/evaluate-<time>.json."
    )
    progress_s: float | None = Field(default=5.0, gt=0, description="Seconds between progress lines; null prints none.")
