"""Hours in minutes: mixed requests with random aborts against the in-house engine; nothing may leak, stick or be lost.

    scripts/bench soak [--minutes 30] [--dtype bfloat16] [--json FILE]

Clients come and go at random: prompts of 4 to 600 tokens of which a third share a beginning, answers of 1 to 200 tokens, one in twenty by
beam search, a fifth of the clients leave in the middle, a few requests are wrong. Memory counts from the end of the first fifth on, when
caches and pools have grown.
Exits with 1 when memory grows by more than 3 %, a slot stays taken, a KV block is not returned, or the engine dies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import psutil
from rich.console import Console

from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import R1RayError
from r1ray.registry import Registry
from r1ray.types import Sampling

NUM_CLIENTS = 24
MOST_GROWTH = 0.03
console = Console()


def request(rng: random.Random, number: int) -> GenerationRequest:
    length = rng.randint(4, 600)
    start = 1000 if rng.random() < 0.33 else rng.randint(1000, 40000)
    ids = tuple(start + i % 8000 for i in range(length))
    sampling = Sampling(
        temperature=rng.choice([0, 0.6, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        max_tokens=rng.randint(1, 200),
        seed=number,
    )
    wrong = rng.random() < 0.02
    if searches := rng.random() < 0.05:
        sampling = sampling.model_copy(update={"temperature": 0.0, "frequency_penalty": 0.0, "max_tokens": rng.randint(1, 60)})
    return GenerationRequest(
        id=str(number),
        prompt_ids=() if wrong else ids,
        sampling=sampling,
        num_beams=rng.randint(2, 5) if searches else 1,
        ignore_eos=rng.random() < 0.5,
        num_logprobs=rng.choice([None, None, 3]),
        prompt_logprobs=not searches and rng.random() < 0.05,
        cache_salt=rng.choice(["", "a"]),
    )


async def client(engine: Engine, rng: random.Random, numbers: list[int], ends: float, counts: Counter[str]) -> None:
    while time.monotonic() < ends:
        numbers[0] += 1
        wanted = request(rng, numbers[0])
        leaves_after = rng.randint(0, wanted.sampling.max_tokens) if rng.random() < 0.2 else None
        counts["requests"] += 1
        counts["searches"] += wanted.num_beams > 1
        try:
            async with aclosing(engine.generate(wanted)) as chunks:
                num_seen = 0
                async for chunk in chunks:
                    num_seen += len(chunk.token_ids)
                    counts["tokens"] += len(chunk.token_ids)
                    if leaves_after is not None and num_seen >= leaves_after:
                        counts["left"] += 1
                        break
        except R1RayError as error:
            counts[type(error).__name__] += 1
        await asyncio.sleep(rng.random() * 0.02)


async def watch(engine: Engine, ends: float, samples: list[tuple[float, float]]) -> None:
    process, begin = psutil.Process(), time.monotonic()
    while time.monotonic() < ends:
        await asyncio.sleep(5)
        samples.append((time.monotonic() - begin, process.memory_info().rss / 2**20))
        stats = engine.stats()
        if len(samples) % 12 == 0:
            held = stats.num_blocks - stats.num_free_blocks
            console.print(
                f"{samples[-1][0] / 60:.0f} min: {samples[-1][1]:.0f} MiB, {stats.num_finished} finished, {stats.num_aborted} aborted, "
                f"{stats.num_preempted} preempted, {held} blocks held",
                style="dim",
            )


async def soak(engine: Engine, minutes: float, samples: list[tuple[float, float]]) -> Counter[str]:
    await engine.start()
    counts: Counter[str] = Counter()
    ends, numbers = time.monotonic() + 60 * minutes, [0]
    clients = [client(engine, random.Random(seed), numbers, ends, counts) for seed in range(NUM_CLIENTS)]
    await asyncio.gather(watch(engine, ends, samples), *clients)
    while engine.stats().num_running:
        await asyncio.sleep(0.05)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    from r1ray.model.importer import import_model

    registry = Registry()
    config = EngineConfig(num_slots=16, max_context=1024, dtype=arguments.dtype, kv_cache_gb=0.15)
    engine = create_engine(import_model("smollm2", registry=registry), config, registry)
    samples: list[tuple[float, float]] = []
    counts = asyncio.run(soak(engine, arguments.minutes, samples))
    stats = engine.stats()
    asyncio.run(engine.stop())
    settled = [memory for second, memory in samples if second > 12 * arguments.minutes]
    fifth = max(1, len(settled) // 5)
    growth = statistics.mean(settled[-fifth:]) / statistics.mean(settled[:fifth]) - 1
    findings = {
        "minutes": arguments.minutes,
        "memory_growth": round(growth, 4),
        "peak_mb": round(max(settled)),
        "free_slots": f"{stats.num_free_slots}/{stats.num_slots}",
        "free_blocks": f"{stats.num_free_blocks}/{stats.num_blocks}",
        "preempted": stats.num_preempted,
        "state": stats.state,
        **counts,
    }
    console.print(findings)
    if arguments.json:
        arguments.json.write_text(json.dumps(findings | {"memory_mb": samples}, indent=1), encoding="utf-8")
    whole = stats.num_free_slots == stats.num_slots and stats.num_free_blocks == stats.num_blocks and stats.state == "running"
    return 0 if whole and growth <= MOST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
