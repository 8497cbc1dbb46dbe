"""Where the time of the in-house engine's steps goes: the parts of a pass, and what the engine spends around it. For bench_engine.py.

Everything in milliseconds. Reaches into the engine's core, since nobody else needs these times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

from workload import NUM_NEW, prompts

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest
from r1ray.registry import Registry
from r1ray.types import Artifact, Sampling

PRODUCTS = ("qkv", "output", "gate_up", "down", "head")


def requests(prompt_ids: Iterable[Iterable[int]], num_new: int) -> list[GenerationRequest]:
    sampling = Sampling(temperature=0, max_tokens=num_new)
    stamp = time.monotonic_ns()
    return [
        GenerationRequest(id=f"{stamp}-{number}", prompt_ids=tuple(ids), sampling=sampling, ignore_eos=True)
        for number, ids in enumerate(prompt_ids)
    ]


def pass_profile(backend: Any, num_streams: int, num_prompt: int) -> dict[str, float]:
    """Milliseconds of one pass, its parts, and those that are products of matrices: what is left when all else costs nothing.

    A decode step of `num_streams` at 256 positions, or, where `num_prompt` is not 0, so many prompt tokens of each.
    """
    from r1ray.engine.backend import Piece

    tables = [list(range(9 * s, 9 * s + 9)) for s in range(num_streams)]
    if num_prompt:
        pieces = [Piece(ids=list(range(num_prompt)), start=0, table=table, num_logits=1) for table in tables]
    else:
        backend.clear(range(9 * num_streams))  # a cache that was never written is no memory, and read in no time
        pieces = [Piece(ids=[7], start=256, table=table, num_logits=1) for table in tables]
    backend.profile()  # forgets what was
    times = []
    for _ in range(5 if num_prompt else 20):
        begin = time.perf_counter()
        backend.forward(pieces)
        times.append(time.perf_counter() - begin)
    best, shares = min(times), backend.profile()
    parts = {part: 1000 * best * share for part, share in shares.items()}
    return {"pass": 1000 * best, "products": sum(parts[part] for part in PRODUCTS), **parts}


def step_profile(engine: Any, num_streams: int) -> dict[str, float]:
    """Milliseconds of a running engine's decode steps (the median of each part): what it spends around the backend's pass.

    plan: the scheduler. draw: the sampler. book: tokens to streams and chunks to mailboxes. between: from one step to the next, the
    event loop that takes the chunks included, since one interpreter runs both.
    """
    from r1ray.engine import core as module
    from r1ray.engine.offline import generate_all

    core = engine._core
    spent: dict[str, float] = {}
    steps: list[dict[str, float]] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[part] = spent.get(part, 0.0) + time.perf_counter() - begin

        return wrapper

    def step(call: Callable[[], None] = core.step) -> None:
        num_before, begin = core.counts["generated"], time.perf_counter()
        previous = spent.pop("end", begin)
        spent.clear()
        call()
        end = time.perf_counter()
        if core.counts["generated"] - num_before == num_streams:
            known = sum(spent.values())
            steps.append({"step": end - previous, **spent, "book": end - begin - known, "between": begin - previous})
        spent["end"] = end

    parts = (
        ("plan", core.scheduler, "plan"),
        ("plan", core.scheduler, "computed"),
        ("pass", core.backend, "submit"),
        ("draw", module, "sample"),
    )
    with ExitStack() as patches:
        for part, where, name in parts:
            patches.enter_context(patch.object(where, name, timed(part, getattr(where, name))))
        patches.enter_context(patch.object(core, "step", step))
        generate_all(engine, requests(prompts(num_streams, num_streams), NUM_NEW))
    decoding = steps[len(steps) // 4 :]  # the first may have prompts beside them
    return {part: 1000 * median(step[part] for step in decoding) for part in ("step", "pass", "plan", "draw", "book", "between")}


def profiles(artifact: Artifact, precision: str) -> dict[str, dict[str, float]]:
    """Where a step's time goes, in milliseconds: of the backend alone, and of the engine that runs over it."""
    from r1ray.engine.create import create_engine

    engine: Any = create_engine(artifact, EngineConfig(num_slots=32, max_context=512, dtype=precision), Registry())  # type: ignore[arg-type]
    found = {f"{precision}, decode x{num}": pass_profile(engine.backend, num, 0) for num in (32, 1)}
    found[f"{precision}, prefill 4 x 128"] = pass_profile(engine.backend, 4, 128)
    found |= {f"{precision}, engine x{num}": step_profile(engine, num) for num in (32, 1)}
    asyncio.run(engine.stop())
    return found
