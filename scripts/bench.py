"""Speed and memory of r1ray's own parts, each against a peer in the same run.

    scripts/bench engine [--ours-only] [--json FILE]

engine: prompts of exactly 128 tokens submitted together, 64 new tokens each, greedy, end of turn ignored, on the bundled model.
The peer is transformers' `generate` with a static batch. tokens_per_s counts new tokens over wall time, prefill included.
Timings are of the machine named in the first line; only ratios within one run compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest
from r1ray.registry import Registry
from r1ray.types import Artifact, Sampling

NUM_PROMPT, NUM_NEW = 128, 64
console = Console()


@dataclass(frozen=True)
class Row:
    """One measurement; the fastest of `--repeats`."""

    engine: str
    precision: str
    concurrency: int
    tokens_per_s: float
    ttft_ms: float
    peak_mb: float


def machine() -> str:
    import torch
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown CPU"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{os.cpu_count()} x {cpu}, {platform.system()}, {versions}, load {os.getloadavg()[0]:.1f}"


def prompts(num: int) -> list[tuple[int, ...]]:
    """Different fixed token sequences: nothing to share between them."""
    return [tuple(1000 + (7 * stream + 13 * place) % 20000 for place in range(NUM_PROMPT)) for stream in range(num)]


def best(measure: Callable[[], tuple[float, float]], repeats: int) -> tuple[float, float]:
    """(tokens per second, TTFT in ms) of the fastest repeat, after one that warms up."""
    measure()
    return max(measure() for _ in range(repeats))


def ours(artifact: Artifact, concurrency: int, repeats: int) -> Row:
    from r1ray.engine.create import create_engine
    from r1ray.engine.offline import generate_all

    engine = create_engine(artifact, EngineConfig(num_slots=concurrency, max_context=512, dtype="bfloat16"), Registry())
    sampling = Sampling(temperature=0, max_tokens=NUM_NEW)

    def measure() -> tuple[float, float]:
        requests = [
            GenerationRequest(id=f"{time.monotonic_ns()}-{number}", prompt_ids=ids, sampling=sampling, ignore_eos=True)
            for number, ids in enumerate(prompts(concurrency))
        ]
        start = time.perf_counter()
        done = generate_all(engine, requests)
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for completion in done)
        return tokens / seconds, 1000 * sum(completion.ttft_s for completion in done) / len(done)

    rate, ttft = best(measure, repeats)
    return Row("r1ray", "bf16", concurrency, rate, ttft, peak_mb())


def theirs(artifact: Artifact, concurrency: int, repeats: int) -> Row:
    import torch

    from r1ray.model.load import load_model

    model: Any = load_model(artifact, registry=Registry(), dtype="bfloat16")
    ids = torch.tensor(prompts(concurrency))

    def generate(num_new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
        return time.perf_counter() - start

    rate, ttft = best(lambda: (concurrency * NUM_NEW / generate(NUM_NEW), 1000 * generate(1)), repeats)
    return Row("transformers generate", "bf16", concurrency, rate, ttft, peak_mb())


def peak_mb() -> float:
    """Of this process, MiB; every row has a process of its own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(rows: list[Row]) -> None:
    table = Table("engine", "precision", "concurrency", "tokens/s", "TTFT ms", "peak MiB", "ratio to peer")
    peers = {row.concurrency: row.tokens_per_s for row in rows if row.engine != "r1ray"}
    for row in rows:
        ratio = f"{row.tokens_per_s / peers[row.concurrency]:.2f}x" if row.engine == "r1ray" and row.concurrency in peers else ""
        table.add_row(
            row.engine, row.precision, str(row.concurrency), f"{row.tokens_per_s:.0f}", f"{row.ttft_ms:.0f}", f"{row.peak_mb:.0f}", ratio
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["engine"], help="what to measure")
    parser.add_argument("--ours-only", action="store_true", help="leave the peer out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--repeats", type=int, default=2, help="measurements per row after the warm-up; the fastest counts")
    arguments = parser.parse_args()
    from r1ray.model.importer import import_model

    artifact = import_model("smollm2", registry=Registry())
    console.print(machine())
    rows = []
    for concurrency in (1, 8, 32):
        for measure in (ours,) if arguments.ours_only else (ours, theirs):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                rows.append(alone.submit(measure, artifact, concurrency, arguments.repeats).result())
            console.print(f"{rows[-1].engine}, {concurrency} streams: {rows[-1].tokens_per_s:.0f} tokens/s", style="dim")
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
