"""Settings of an engine. Imports no torch; `create.py` turns it into a running engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r1ray.config import Config

__all__ = ["EngineConfig", "FakeConfig"]


class FakeConfig(Config):
    """The fake engine's knobs: for tests of everything above an engine, with no model at all."""

    token_delay_s: float = Field(default=0.0, ge=0, description="Seconds that each token takes.")
    fail_after_tokens: int | None = Field(default=None, ge=0, description="The engine dies after this many tokens in total; null never.")
    max_answer_tokens: int | None = Field(default=None, ge=1, description="Longest echo; null repeats the whole prompt.")


class EngineConfig(Config):
    """How one replica generates. The same settings serve chat, evaluation and sampling sweeps."""

    type: Literal["torch", "fake"] = Field(default="torch", description="torch: the in-house engine; fake: echoes the prompt's ids.")
    backend: Literal["auto", "native", "transformers"] = Field(
        default="auto",
        description="Of the in-house engine. native: compiled CPU kernels (Llama, Qwen2, Qwen3 on AVX-512); transformers: any model and "
        "device; auto: native where it can run.",
    )
    num_slots: int = Field(default=8, ge=1, le=512, description="Streams that run together.")
    tpot_objective_ms: float | None = Field(
        default=None,
        gt=0,
        description="Longest time between two tokens of a stream: fewer than num_slots run together when it is exceeded; null: always all.",
    )
    min_slots: int = Field(default=4, ge=1, description="Streams that run together whatever tpot_objective_ms says (seed 002: 4 to 32).")
    max_waiting: int = Field(default=256, ge=0, description="Requests that may wait for a slot; one more is refused (QueueFull).")
    max_context: int | None = Field(default=None, ge=2, description="Prompt plus answer in tokens; null is the model's own limit.")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="What weights are held in. int8: weights and activations, native backend only; auto: what `r1ray calibrate` found, "
        "else bfloat16 where the processor multiplies it natively, else float32.",
    )
    device: str = Field(default="auto", description="torch device: cpu, cuda, cuda:1; auto takes a GPU when there is one.")
    num_threads: int | None = Field(default=None, ge=1, description="Threads inside one operation; null: all cores it may use.")
    prefill_chunk: int = Field(
        default=256, ge=1, description="Prompt tokens computed per step beside the running streams: less is smoother, more is faster."
    )
    stages: int = Field(
        default=1,
        ge=1,
        description="Pipeline stages: layers are split over this process and stages - 1 Ray actors, on other nodes if placement says so.",
    )
    stage_cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that Ray reserves for each actor of a pipeline.")
    stage_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each actor of a pipeline.")
    prefix_cache: bool = Field(default=True, description="Keep what prompts that begin alike have computed.")
    kv_cache_gb: float | None = Field(
        default=None,
        gt=0,
        description="Memory for keys and values; null: what num_slots full contexts need, at most a share of what is free.",
    )
    fake: FakeConfig = Field(default_factory=FakeConfig, description="Only for type fake.")
