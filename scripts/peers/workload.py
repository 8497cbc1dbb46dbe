"""The workload that every engine gets, as plain lists: imported by the peers, which live in environments of their own."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable

NUM_PROMPT, NUM_NEW = 128, 64
CONCURRENCIES = (1, 8, 32)


def prompts(num: int, run: int = 0) -> list[list[int]]:
    """Fixed token sequences that share no beginning, other ones for every run: nothing can be found in a cache."""
    return [[1000 + (7 * stream + 13 * place + 101 * run) % 20000 for place in range(NUM_PROMPT)] for stream in range(num)]


def measure(engine: str, precision: str, generate: Callable[[list[list[int]], int], None], repeats: int) -> None:
    """Print a JSON row per concurrency. `generate(prompts, num_new)` returns when every prompt has its new tokens."""
    for concurrency in CONCURRENCIES:
        generate(prompts(concurrency), 4)
        rates, firsts = [], []
        for run in range(1, repeats + 1):
            start = time.perf_counter()
            generate(prompts(concurrency, run), 1)
            firsts.append(time.perf_counter() - start)
            start = time.perf_counter()
            generate(prompts(concurrency, 100 + run), NUM_NEW)
            rates.append(concurrency * NUM_NEW / (time.perf_counter() - start))
        row = {"engine": engine, "precision": precision, "concurrency": concurrency, "tokens_per_s": max(rates)}
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**row, "ttft_ms": 1000 * min(firsts), "peak_mb": peak_mb}), flush=True)
