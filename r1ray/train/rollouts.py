"""Answers of the model in training, written by r1ray's own engine: the base's weights once, the adapter anew after each step.

On a CPU the engine writes several times faster than transformers' generate, and says how likely each token was when it was drawn.
Knows no reward and no trainer.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import UnsupportedModel
from r1ray.train.order import WorkOrder
from r1ray.types import Sampling

if TYPE_CHECKING:
    from r1ray.train.config import TrainConfig

__all__ = ["EngineRollouts", "Rollout", "choose_rollouts", "engine_for", "seed_of"]

_ADAPTER = "policy"
_MOST_SLOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer with the stop token that ended it, and each token's log-probability when it was drawn."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(slots=True)
class EngineRollouts:
    """`directory` is where the adapter passes through; `stop_ids` are what the trainer takes for an end."""

    engine: Engine
    directory: Path
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def load(self, model: Any) -> None:
        """The engine answers as the PEFT `model` does now."""
        model.save_pretrained(self.directory, selected_adapters=["default"])
        asyncio.run(self._load())

    def draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, top_p: float = 1.0) -> list[Rollout]:
        """One answer per prompt; the same seed gives the same answer in any company."""
        wanted = [
            GenerationRequest(
                id=str(number),
                prompt_ids=tuple(ids),
                sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=self.max_new_tokens, seed=seed),
                stop_token_ids=self.stop_ids,
                adapter=_ADAPTER,
                keep_stop=True,
                num_logprobs=0,
            )
            for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return [Rollout(token_ids=list(one.token_ids), logprobs=list(one.logprobs)) for one in generate_all(self.engine, wanted)]

    def close(self) -> None:
        asyncio.run(self.engine.stop())

    async def _load(self) -> None:
        await self.engine.start()
        await self.engine.load_adapter(_ADAPTER, self.directory)


def choose_rollouts(order: WorkOrder) -> tuple[bool, str]:
    """(whether the engine writes the answers, why).

    Raises:
        UnsupportedModel: `rollouts: engine` where it cannot.
    """
    wanted = order.config.grpo.rollouts
    if wanted == "transformers":
        return False, "train.grpo.rollouts says so"
    why_not = _why_not(order)
    if why_not is None:
        return True, "train.grpo.rollouts says so" if wanted == "engine" else "it runs this model with an adapter beside its weights"
    if wanted == "engine":
        raise UnsupportedModel(f"train.grpo.rollouts=engine cannot write this training's answers: {why_not}. Set it to auto.")
    return False, why_not


def engine_for(order: WorkOrder, num_answers: int) -> Engine:
    """The engine over the order's base, in the number type of the training; not yet started."""
    import torch

    from r1ray.engine.config import EngineConfig
    from r1ray.engine.create import create_engine
    from r1ray.registry import Registry

    config = order.config
    settings = EngineConfig(
        backend="native",
        dtype=order.dtype,  # float32 or bfloat16, as training has it
        device="cpu",
        num_slots=min(_MOST_SLOTS, num_answers),
        max_waiting=num_answers,
        max_context=config.max_length,
        num_threads=torch.get_num_threads(),  # the worker's, whose training waits meanwhile
    )
    return create_engine(order.base, settings, Registry(order.settings))


def seed_of(*parts: object) -> int:
    """A seed for each answer that depends on nothing but what it answers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def _why_not(order: WorkOrder) -> str | None:
    from transformers import AutoConfig

    from r1ray.engine.native import build
    from r1ray.engine.native.model import refusal

    return _of_training(order.config) or build.why_not() or refusal(AutoConfig.from_pretrained(order.base.path), order.dtype)  # type: ignore[arg-type]


def _of_training(config: TrainConfig) -> str | None:
    reasons = {
        "the workers have GPUs and the engine's kernels are for CPUs": config.use_gpu,
        f"method {config.method} changes the weights that the engine holds": config.method != "lora",
        "DoRA changes the weights' magnitude, which the engine cannot do beside them": config.lora.dora,
        "adapted experts cannot run beside the weights": config.lora.experts,
        "ZeRO-3 splits the adapter over the workers": config.zero_stage == 3,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
