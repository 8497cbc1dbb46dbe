"""Is the simulator right? Step costs measured on the real engine, then one workload simulated and played for real, side by side.

    python scripts/bench_simulator.py [--loads 0.4,0.7] [--seconds 30] [--slots 8] [--json FILE]

Uses the engine through r1ray.engine.protocol alone: what a step costs is worked out from the times at which tokens arrive. The bundled
model generates on this machine; end of turn is ignored, so that lengths are those of the workload. Exit code 1 when a median or 90th
percentile of TTFT or TPOT, or the throughput, is off by more than 20 %. Waiting multiplies what disturbs the engine, so the processor time
of everything else on the machine is shown beside each workload: above some 10 % of a core the errors say nothing of the simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.engine.simulate import Limits, Sample, StepCost, Trace, fit, poisson, simulate
from r1ray.registry import Registry
from r1ray.types import Sampling

console = Console(highlight=False)
ALLOWED = 0.2
NUM_ROUNDS = 3
DISTURBED = 0.1  # cores that others take
number_of_prompts = itertools.count()


@dataclass(frozen=True)
class Stream:
    """One real generation: when it was sent, and when each token came."""

    sent: float
    times: list[float]

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else float("nan")


async def stream(engine: Engine, prompt: int, answer: int, times: list[float] | None = None) -> Stream:
    """`times` is filled while it runs."""
    rng = np.random.default_rng(next(number_of_prompts))
    ids = tuple(int(each) for each in rng.integers(1000, 20000, prompt))  # nothing to share between prompts
    sampling = Sampling(temperature=0, max_tokens=answer)
    request = GenerationRequest(id=f"{time.monotonic_ns()}-{ids[0]}", prompt_ids=ids, sampling=sampling, ignore_eos=True)
    sent, times = time.perf_counter(), [] if times is None else times
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            times += [time.perf_counter()] * len(chunk.token_ids)
    return Stream(sent, times)


async def together(engine: Engine, num: int, prompt: int, answer: int) -> list[Stream]:
    return list(await asyncio.gather(*(stream(engine, prompt, answer) for _ in range(num))))


async def decoding(engine: Engine, rows: int, prompt: int, answer: int) -> Sample:
    """Steps in which all of `rows` streams decode and nobody reads a prompt."""
    streams = await together(engine, rows, prompt, answer)
    begin, end = max(each.times[0] for each in streams), min(each.times[-1] for each in streams)
    inside = [[when for when in each.times if begin <= when <= end] for each in streams]
    steps = min(len(times) for times in inside) - 1
    begun = [sum(when < begin for when in each.times) for each in streams]
    context = sum(prompt + before + (steps + 1) / 2 for before in begun) * steps
    return Sample(seconds=end - begin, rows=rows * steps, context_tokens=context, steps=steps)


async def reading(engine: Engine, limits: Limits, prompt: int) -> Sample:
    """A prompt on an idle engine."""
    alone = await stream(engine, prompt, 1)
    pieces = -(-prompt // (limits.prefill_chunk * limits.idle_factor))
    return Sample(seconds=alone.ttft, prefill_tokens=prompt, steps=pieces)


async def beside(engine: Engine, rows: int, prompt: int) -> Sample:
    """A prompt that arrives while `rows` streams decode: from the last token before it to its own first token."""
    seen_times: list[list[float]] = [[] for _ in range(rows)]
    tasks = [asyncio.create_task(stream(engine, 64, 400, times)) for times in seen_times]
    while min(len(times) for times in seen_times) < 4:  # all of them decode, none is near its end
        await asyncio.sleep(0.001)
    late = await stream(engine, prompt, 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    begin = max(when for times in seen_times for when in times if when <= late.sent)
    steps = max(sum(begin < when <= late.times[0] + 1e-4 for when in times) for times in seen_times)
    seen = [sum(when <= begin for when in times) for times in seen_times]
    context = sum(64 + before for before in seen) * steps
    return Sample(seconds=late.times[0] - begin, prefill_tokens=prompt, rows=rows * steps, context_tokens=context, steps=steps)


async def probes(engine: Engine, limits: Limits) -> list[Sample]:
    """Steps over the range that the workload will use, several times: a machine's speed changes from second to second."""
    most = limits.num_slots
    some = (1, max(1, most // 2), most)
    samples = []
    for _ in range(NUM_ROUNDS):
        samples += [await decoding(engine, num, prompt, 30) for num in some for prompt in (32, 200)]
        samples += [await reading(engine, limits, prompt) for prompt in (16, 100, 200)]
        samples += [await beside(engine, num, prompt) for num in (*some[:2], most - 1) for prompt in (60, 200)]
    return samples


async def play(engine: Engine, trace: Trace) -> tuple[list[Stream], float]:
    begin = time.perf_counter()

    async def later(number: int) -> Stream:
        await asyncio.sleep(max(0.0, float(trace.arrivals[number]) - (time.perf_counter() - begin)))
        return await stream(engine, int(trace.prompts[number]), int(trace.answers[number]))

    streams = list(await asyncio.gather(*(later(number) for number in range(len(trace.arrivals)))))
    return streams, max(each.times[-1] for each in streams) - (begin + float(trace.arrivals[0]))


@dataclass(frozen=True)
class Row:
    """One figure of one workload; `load` is the share of the engine's capacity that arrives."""

    load: float
    figure: str
    simulated: float
    measured: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def compare(load: float, trace: Trace, cost: StepCost, limits: Limits, real: tuple[list[Stream], float]) -> list[Row]:
    streams, seconds = real
    outcome = simulate(trace, cost, limits)
    rows = []
    for name, simulated, measured in (
        ("TTFT", outcome.ttft, np.array([each.ttft for each in streams])),
        ("TPOT", outcome.tpot, np.array([each.tpot for each in streams])),
    ):
        for share in (50, 90):
            values = (float(np.nanpercentile(each, share)) * 1000 for each in (simulated, measured))
            rows.append(Row(load, f"{name} p{share} ms", *values))
    tokens = int(trace.answers.sum())
    rows.append(Row(load, "tokens/s", outcome.tokens_per_s, tokens / seconds))
    return rows


def show(rows: list[Row]) -> None:
    table = Table("load", "", "simulated", "measured", "error")
    for row in rows:
        style = "red" if abs(row.error) > ALLOWED else ""
        table.add_row(f"{row.load:.0%}", row.figure, f"{row.simulated:.1f}", f"{row.measured:.1f}", f"{row.error:+.1%}", style=style)
    console.print(table)


async def run(engine: Engine, limits: Limits, loads: list[float], seconds: float) -> tuple[list[StepCost], list[Row]]:
    """Each workload is predicted from the probes just before and just after it, since a shared machine's speed drifts."""
    await engine.start()
    await together(engine, limits.num_slots, 64, 8)  # warm-up
    before = await probes(engine, limits)
    capacity = requests_per_s(fit(before), limits)
    console.print(f"{len(before)} probes; capacity about {capacity:.2f} requests/s", style="dim")
    costs, rows = [], []
    for load in loads:
        trace = workload(load * capacity, max(10, round(seconds * load * capacity)))
        others = Others()
        real = await play(engine, trace)
        share = others.share()
        after = await probes(engine, limits)
        cost = fit([*before, *after])
        report(load, trace, cost, [*before, *after], share)
        costs.append(cost)
        rows += compare(load, trace, cost, limits, real)
        before = after
    await engine.stop()
    return costs, rows


class Others:
    """What everything but this process takes of the processors from now on, the hypervisor included."""

    def __init__(self) -> None:
        self._begin = self._used()

    def share(self) -> float:
        """In cores."""
        used, when = self._used()
        return (used - self._begin[0]) / (when - self._begin[1])

    @staticmethod
    def _used() -> tuple[float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # a guest's time is in user's already
        return busy - own.user - own.system, time.monotonic()


def report(load: float, trace: Trace, cost: StepCost, samples: list[Sample], others: float) -> None:
    spread = np.std([cost_of(cost, sample) / sample.seconds - 1 for sample in samples])
    style = "yellow" if others > DISTURBED else "dim"
    console.print(f"load {load:.0%}: everything else on the machine took {others:.0%} of a core", style=style)
    console.print(f"load {load:.0%}, {len(trace.arrivals)} requests; a step: {1000 * cost.fixed:.2f} ms,", style="dim")
    console.print(f"{1e6 * cost.per_prefill_token:.0f} us per prompt token, {1000 * cost.per_row:.2f} ms per stream,", style="dim")
    console.print(f"{1e6 * cost.per_context_token:.2f} us per position; fits its probes to {spread:.1%}", style="dim")


def workload(rate: float, requests: int) -> Trace:
    return poisson(rate=rate, num=requests, prompt="16-160", answer="8-32", seed=7)


def requests_per_s(cost: StepCost, limits: Limits) -> float:
    """What the engine ends per second when requests never run out."""
    return 300 / simulate(workload(1e6, 300), cost, limits).seconds


def cost_of(cost: StepCost, sample: Sample) -> float:
    return cost.seconds(sample.prefill_tokens, sample.rows, sample.context_tokens) + (sample.steps - 1) * cost.fixed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="0.4,0.7", help="shares of the engine's capacity that arrive, comma-separated")
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals per load")
    parser.add_argument("--slots", type=int, default=8, help="engine.num_slots")
    parser.add_argument("--idle-factor", type=int, default=4, help="prompt pieces that an idle engine reads in one step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    from r1ray.engine.create import create_engine
    from r1ray.model.importer import import_model

    registry = Registry()
    config = EngineConfig(num_slots=arguments.slots, max_context=1024)
    engine = create_engine(import_model("smollm2", registry=registry), config, registry)
    limits = Limits(num_slots=arguments.slots, prefill_chunk=config.prefill_chunk, idle_factor=arguments.idle_factor)
    loads = [float(load) for load in arguments.loads.split(",")]
    costs, rows = asyncio.run(run(engine, limits, loads, arguments.seconds))
    show(rows)
    if arguments.json:
        record: dict[str, Any] = {"costs": [asdict(cost) for cost in costs], "rows": [asdict(row) | {"error": row.error} for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return int(any(abs(row.error) > ALLOWED for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
