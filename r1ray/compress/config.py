"""Settings of what makes a model smaller. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config

__all__ = ["ExportOnnxConfig", "ParityConfig"]


class ParityConfig(Config):
    """How an export is compared with transformers in float32 before it gets a version."""

    text: Path | None = Field(default=None, description="UTF-8 text like the model's use; null: the bank demo's dialogues.")
    num_tokens: int = Field(default=20_000, ge=64, description="Tokens of that text whose perplexity is compared; fewer say little.")
    max_perplexity_loss: float = Field(
        default=0.015,
        ge=0,
        description="Largest share by which perplexity may grow (the seeds' bound: 1.5 %); beyond it nothing is registered.",
    )
    min_first_choices: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Least share of positions with the same likeliest token: perplexity alone may improve by chance.",
    )
    num_prompts: int = Field(default=8, ge=1, le=64, description="Prompts out of that text that are answered greedily, all in one batch.")
    num_new: int = Field(default=24, ge=1, le=512, description="Tokens of each such answer.")
    max_logit_error: float = Field(
        default=1e-4, gt=0, description="Of float32 exports: largest difference of a logit as a share of the largest logit."
    )


class ExportOnnxConfig(Config):
    """One export: a registered version -> a version of kind onnx."""

    model: str = Field(description="Registry reference of full or pruned weights, or of an adapter, which is merged into its base.")
    name: str | None = Field(
        default=None, description="Registered name of the export; null: the model's own, so the export is its next version."
    )
    precision: Literal["int8", "int4", "float32", "float16"] = Field(
        default="int8",
        description="int8, int4: weights in blocks, activations rounded to int8 on CPUs; float32: exact; float16: for device cuda.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="What the graph is made for. cuda is checked on a GPU with onnxruntime-gpu."
    )
    block_size: Literal[16, 32, 64, 128, 256] = Field(default=32, description="Weights that share one scale, in int8 and int4.")
    int4_method: Literal["rtn", "k_quant"] = Field(
        default="k_quant", description="How int4 rounds: rtn to the nearest; k_quant fits each block's scale, better and slower to make."
    )
    int4_mixed: bool = Field(default=True, description="int4 keeps the head and the layers that suffer most in int8.")
    parity: ParityConfig = Field(default_factory=ParityConfig, description="The comparison that an export must pass.")

    @model_validator(mode="after")
    def _float16_is_for_gpus(self) -> Self:
        if self.precision == "float16" and self.device == "cpu":
            raise ValueError("precision=float16 on device cpu has no fast kernels: take int8 or float32, or device=cuda")
        return self
