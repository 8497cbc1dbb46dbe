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
    num_slots: int = Field(default=8, ge=1, le=512, description="Streams that decode together; each holds one row of the KV cache.")
    max_waiting: int = Field(default=256, ge=0, description="Requests that may wait for a slot; one more is refused (QueueFull).")
    max_context: int | None = Field(default=None, ge=2, description="Prompt plus answer in tokens; null is the model's own limit.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of weights and KV cache; auto is bfloat16 where the processor multiplies it natively."
    )
    device: str = Field(default="auto", description="torch device: cpu, cuda, cuda:1; auto takes a GPU when there is one.")
    num_threads: int | None = Field(default=None, ge=1, description="Threads inside one operation; null: all cores it may use.")
    prefill_chunk: int = Field(
        default=256, ge=1, description="Prompt tokens computed per step beside the running streams: less is smoother, more is faster."
    )
    fake: FakeConfig = Field(default_factory=FakeConfig, description="Only for type fake.")
