"""Tiny models that answer in varied tokens, and what transformers' own generate says to each prompt."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest, TokenChunk
from r1ray.types import Sampling

FAMILIES = ("tiny_llama", "tiny_qwen2", "tiny_deepseek_v3")


def lively(directory: Path) -> Any:
    """A copy of the model with larger weights: random ones as initialised repeat one token for ever."""
    return copy.deepcopy(_lively(directory))


@functools.cache
def _lively(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and ".gate." not in name:  # a saturated router ties its experts; rounding would choose among them
                parameter.mul_(6)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@functools.cache
def _greedy(directory: Path, adapter: Path | None, prompt: tuple[int, ...], num: int) -> list[int]:
    import torch
    from peft import PeftModel

    model = lively(directory)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def reference() -> Callable[..., list[int]]:
    """(model directory, prompt, number of tokens, adapter directory) -> transformers' own greedy tokens."""

    def greedy(directory: Path, prompt: tuple[int, ...], num: int, adapter: Path | None = None) -> list[int]:
        return _greedy(directory, adapter, prompt, num)

    return greedy


def prompts(num: int, *, seed: int = 0, longest: int = 60) -> list[tuple[int, ...]]:
    import random

    rng = random.Random(seed)
    return [tuple(rng.randrange(20, 500) for _ in range(rng.randint(1, longest))) for _ in range(num)]


def wanted(
    id: str, prompt: tuple[int, ...], *, max_tokens: int = 12, temperature: float = 0, sampling: dict[str, Any] | None = None, **rest: Any
) -> GenerationRequest:
    rest.setdefault("ignore_eos", True)
    settings = {"temperature": temperature, "max_tokens": max_tokens, **(sampling or {})}
    return GenerationRequest(id=id, prompt_ids=prompt, sampling=Sampling(**settings), **rest)


@contextlib.asynccontextmanager
async def running(model: Any, *, eos: tuple[int, ...] = (), **settings: Any) -> AsyncIterator[Any]:
    from r1ray.engine.torch import TorchEngine

    engine = TorchEngine(model, EngineConfig(num_threads=1, **settings), eos_token_ids=eos)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: Any, request: GenerationRequest) -> list[TokenChunk]:
    async with aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


async def tokens(engine: Any, request: GenerationRequest) -> list[int]:
    return [t for chunk in await collect(engine, request) for t in chunk.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)
