"""Which precision is fastest on this machine and loses nothing that counts: measured once per model, then `dtype: auto` knows.

Perplexity and first choices of each precision on real text against float32, and the time of short answers at a few batch sizes. A
precision that loses more than the bound is out whatever its speed. The finding is kept per weights and machine; without one, `auto`
stays at bfloat16.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from r1ray.engine.backend import BLOCK_SIZE, Backend, Piece
from r1ray.engine.batching import BatchingEngine
from r1ray.engine.calibration import Calibration, choose, store_calibration
from r1ray.engine.config import EngineConfig, Precision
from r1ray.engine.create import create_engine
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import InvalidValue
from r1ray.registry import Registry
from r1ray.types import Artifact, Sampling

__all__ = ["MIN_TOKENS", "calibrate"]

MIN_TOKENS = 20_000  # of text that is scored; less says little
PIECE = 256  # tokens of one context
BATCHES = (1, 8)  # streams: one user, a few
PROMPT, ANSWER = 128, 48  # tokens of what is timed


def calibrate(
    artifact: Artifact,
    token_ids: Sequence[int],
    *,
    registry: Registry,
    precisions: Sequence[Precision] = get_args(Precision),
    on_done: Callable[[str], None] | None = None,
) -> Calibration:
    """Measure, choose and keep. `token_ids` is real text of the model's use, at least MIN_TOKENS of it; float32 comes first.

    Raises:
        InvalidValue: too little text.
        UnsupportedModel: the native backend cannot run the model here, so there is nothing to choose.
    """
    if len(token_ids) < MIN_TOKENS:
        raise InvalidValue(f"{len(token_ids)} tokens of text; calibration needs {MIN_TOKENS}. Give a longer --text.")
    perplexity: dict[str, float] = {}
    agreement: dict[str, float] = {}
    speed: dict[str, dict[str, float]] = {}
    right: Tensor | None = None
    for precision in precisions:
        config = EngineConfig(backend="native", dtype=precision, num_slots=max(BATCHES), max_context=2 * PIECE, prefix_cache=False)
        engine = create_engine(artifact, config, registry)
        assert isinstance(engine, BatchingEngine), "of backend native"
        try:
            perplexity[precision], choices = _score(engine.backend, token_ids)
            speed[precision] = {str(num): _speed(engine, num) for num in BATCHES}
        finally:
            asyncio.run(engine.stop())
        right = choices if right is None else right
        agreement[precision] = float((choices == right).float().mean())
        rates = ", ".join(f"{rate:.0f} tokens/s with {num}" for num, rate in speed[precision].items())
        if on_done is not None:
            on_done(f"{precision}: perplexity {perplexity[precision]:.3f}, {agreement[precision]:.1%} of first choices, {rates}")
    chosen, reason = choose(perplexity, speed)
    found = Calibration(
        num_tokens=len(token_ids), perplexity=perplexity, agreement=agreement, tokens_per_s=speed, chosen=chosen, reason=reason
    )
    store_calibration(artifact, registry.settings, found)
    return found


def _score(backend: Backend, token_ids: Sequence[int]) -> tuple[float, Tensor]:
    """Perplexity, and the likeliest token after each."""
    table = range(PIECE // BLOCK_SIZE)
    losses, choices = [], []
    for first in range(0, len(token_ids) - 1, PIECE):
        ids = token_ids[first : first + PIECE]
        logits = backend.forward([Piece(ids=ids, start=0, table=table, num_logits=len(ids))])[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
        choices.append(logits.argmax(dim=-1))
    return math.exp(float(torch.cat(losses).double().mean())), torch.cat(choices)


def _speed(engine: Engine, num: int) -> float:
    """New tokens per second of `num` answers that begin together, prompts included; the fastest of two."""

    def seconds(turn: int, max_tokens: int) -> float:
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        ids = tuple(range(100, 100 + PROMPT))
        requests = [GenerationRequest(id=f"{turn}-{i}", prompt_ids=ids, sampling=sampling, ignore_eos=True) for i in range(num)]
        start = time.perf_counter()
        generate_all(engine, requests)
        return time.perf_counter() - start

    seconds(0, 2)
    return num * ANSWER / min(seconds(turn, ANSWER) for turn in (1, 2))
