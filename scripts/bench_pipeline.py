"""A model as a pipeline of two stages on two raylets of this machine, against one process with the same cores.

    scripts/bench pipeline [--json FILE]

The workload of `scripts/bench engine` with 32 streams, bfloat16: one process with two compute threads, then two stages that take turns on
both cores (the default on one machine), then two that work at the same time with a core each. Also the time of one hop: a pass of one
token through both stages less one process's own with as many threads, over the two transfers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from r1ray.environment import prepare_environment

prepare_environment()
sys.path.insert(0, str(Path(__file__).with_name("peers")))

from rich.console import Console  # noqa: E402
from workload import NUM_NEW, prompts  # noqa: E402

from r1ray.engine.backend import Piece  # noqa: E402
from r1ray.engine.config import EngineConfig  # noqa: E402
from r1ray.engine.create import create_engine  # noqa: E402
from r1ray.engine.offline import generate_all  # noqa: E402
from r1ray.engine.protocol import GenerationRequest  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.types import Sampling  # noqa: E402

CONCURRENCY = 32
ROUNDS = 5
STAGES = {"two stages in turns, 2 threads each": 2, "two stages at once, 1 thread each": 1}
console = Console()


def generated(engine: Any, seed: int, num_new: int = NUM_NEW) -> float:
    """Tokens per second of 32 requests at once, whose prompts `seed` chooses."""
    sampling = Sampling(temperature=0, max_tokens=num_new)
    requests = [
        GenerationRequest(id=f"{seed}-{i}", prompt_ids=tuple(ids), sampling=sampling, ignore_eos=True)
        for i, ids in enumerate(prompts(CONCURRENCY, seed))
    ]
    start = time.perf_counter()
    generate_all(engine, requests)
    return CONCURRENCY * num_new / (time.perf_counter() - start)


def pass_ms(backend: Any) -> float:
    """A pass of one token, the fastest of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        backend.forward([Piece(ids=[7], start=0, table=[0], num_logits=1)])
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def compared(pipeline: Any, alone: Any, as_many_threads: Any) -> dict[str, float]:
    """By turns, so that a slow minute of the machine is no difference between them; `as_many_threads` is one process with a stage's own."""
    passes = [(pass_ms(as_many_threads.backend), pass_ms(pipeline.backend)) for _ in range(ROUNDS)]
    for engine in (alone, pipeline):
        generated(engine, 49, num_new=4)
    rates = [(generated(alone, 50 + number), generated(pipeline, 50 + number)) for number in range(ROUNDS)]
    one, two = (min(column) for column in zip(*passes, strict=True))
    return {
        "passes under way": pipeline.backend.depth,
        "one process: ms of a pass": one,
        "hop ms": (two - one) / 2,
        "one process: tokens/s": statistics.median(rate for rate, _ in rates),
        "tokens/s": statistics.median(rate for _, rate in rates),
        "of one process": statistics.median(theirs / own for own, theirs in rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    import asyncio

    import ray
    from ray.cluster_utils import Cluster

    from r1ray.model.importer import import_model

    registry = Registry()
    artifact = import_model("smollm2", registry=registry)
    common = {"num_slots": CONCURRENCY, "max_context": 256, "dtype": "bfloat16"}

    def engine(stages: int, num_threads: int) -> Any:
        return create_engine(artifact, EngineConfig(stages=stages, num_threads=num_threads, **common), registry)  # type: ignore[arg-type]

    found: dict[str, float] = {}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        alone = {num_threads: engine(1, num_threads) for num_threads in STAGES.values()}
        for name, num_threads in STAGES.items():
            pipeline = engine(2, num_threads)
            found |= {f"{name}: {what}": value for what, value in compared(pipeline, alone[2], alone[num_threads]).items()}
            asyncio.run(pipeline.stop())
        for each in alone.values():
            asyncio.run(each.stop())
    finally:
        ray.shutdown()
        nodes.shutdown()
    for name, value in found.items():
        console.print(f"{name}: {value:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
