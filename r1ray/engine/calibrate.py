"""Which precision is fastest on this machine and loses nothing that counts: measured once per model, then `dtype: auto` knows.

Perplexity of each precision on real text against float32, and the time of a decode step at a few batch sizes. A precision that loses more
than the bound is out whatever its speed. The finding is kept per weights and machine; without one, `auto` stays at bfloat16.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence

from r1ray.engine.calibration import Calibration, store_calibration
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.native.weights import Precision
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import InvalidValue
from r1ray.registry import Registry
from r1ray.types import Artifact, Sampling

__all__ = ["LARGEST_LOSS", "MIN_TOKENS", "calibrate"]

LARGEST_LOSS = 0.015  # seeds: the accuracy that quantisation may cost
MIN_TOKENS = 20_000  # of text that is scored; less says little
PIECE = 256  # tokens of one context
BATCHES = (1, 8)  # streams: one user, a few
NUM_STEPS = 24


def calibrate(
    artifact: Artifact,
    token_ids: Sequence[int],
    *,
    registry: Registry,
    precisions: Sequence[Precision] = ("float32", "bfloat16", "int8"),
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
    speed: dict[str, dict[str, float]] = {}
    for precision in precisions:
        config = EngineConfig(backend="native", dtype=precision, num_slots=max(BATCHES), max_context=2 * PIECE, prefix_cache=False)
        engine = create_engine(artifact, config, registry)
        try:
            perplexity[precision] = _perplexity(engine, token_ids)
            speed[precision] = {str(num): _speed(engine, num) for num in BATCHES}
        finally:
            asyncio.run(engine.stop())
        rates = ", ".join(f"{rate:.0f} tokens/s with {num}" for num, rate in speed[precision].items())
        if on_done is not None:
            on_done(f"{precision}: perplexity {perplexity[precision]:.3f}, {rates}")
    chosen, reason = _choose(perplexity, speed)
    found = Calibration(
        num_tokens=len(token_ids),
        perplexity=perplexity,
        tokens_per_s=speed,
        chosen=chosen,
        reason=reason,
    )
    store_calibration(artifact, registry.settings, found)
    return found


def _choose(perplexity: Mapping[str, float], speed: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The fastest at one stream and a few (geometric mean) among those within the bound."""
    losses = {precision: value / perplexity["float32"] - 1 for precision, value in perplexity.items()}
    within = [precision for precision, loss in losses.items() if loss <= LARGEST_LOSS]
    mean = {precision: math.prod(speed[precision].values()) ** (1 / len(BATCHES)) for precision in within}
    chosen = max(within, key=lambda precision: mean[precision])
    out = [f"{precision} loses {losses[precision]:+.1%}" for precision in losses if precision not in within]
    reason = f"{mean[chosen]:.0f} tokens/s, perplexity {losses[chosen]:+.2%} to float32"
    return chosen, "; ".join([reason, *out])


def _perplexity(engine: Engine, token_ids: Sequence[int]) -> float:
    sampling = Sampling(temperature=0, max_tokens=1)
    pieces = [tuple(token_ids[first : first + PIECE]) for first in range(0, len(token_ids), PIECE)]
    requests = [
        GenerationRequest(id=f"piece {number}", prompt_ids=piece, sampling=sampling, ignore_eos=True, prompt_logprobs=True)
        for number, piece in enumerate(pieces)
        if len(piece) > 1
    ]
    logprobs = [value for done in generate_all(engine, requests) for value in done.prompt_logprobs]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def _speed(engine: Engine, num: int) -> float:
    """Tokens per second while `num` streams decode, the fastest of two."""
    sampling = Sampling(temperature=0, max_tokens=NUM_STEPS)

    def seconds(turn: int, max_tokens: int) -> float:
        wanted = sampling.model_copy(update={"max_tokens": max_tokens})
        ids = tuple(range(100, 164))
        requests = [GenerationRequest(id=f"{turn}-{i}", prompt_ids=ids, sampling=wanted, ignore_eos=True) for i in range(num)]
        start = time.perf_counter()
        generate_all(engine, requests)
        return time.perf_counter() - start

    seconds(0, 2)
    decoding = min(seconds(turn, NUM_STEPS) - seconds(turn + 10, 1) for turn in (1, 2))
    return num * (NUM_STEPS - 1) / max(decoding, 1e-9)
