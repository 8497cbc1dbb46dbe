"""Is the simulator right? One workload played on the real engine and simulated, side by side.

    python scripts/bench_simulator.py [--loads 0.4,0.7] [--seconds 30] [--slots 8] [--json FILE]

Uses the engine through r1ray.engine.protocol alone. What a step costs is fitted to the steps of the run itself, which the times of the
tokens show: how long each took, for how many streams, positions and prompt tokens. What is put to the test is everything else: who waits
for whom, and what that makes of the percentiles. A few probes before the first workload say how much the engine can take. The bundled
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
from collections import defaultdict
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
NUM_ROUNDS = 2
ONE_STEP_S = 0.0015  # tokens of one step arrive within this time, the next step's later
NUM_SUMMED = 10  # steps of a kind that make one sample, so that noise averages out
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


async def stream(engine: Engine, prompt: int, answer: int) -> Stream:
    rng = np.random.default_rng(next(number_of_prompts))
    ids = tuple(int(each) for each in rng.integers(1000, 20000, prompt))  # nothing to share between prompts
    sampling = Sampling(temperature=0, max_tokens=answer)
    request = GenerationRequest(id=f"{time.monotonic_ns()}-{ids[0]}", prompt_ids=ids, sampling=sampling, ignore_eos=True)
    sent, times = time.perf_counter(), []
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


async def probes(engine: Engine, limits: Limits) -> list[Sample]:
    """Steps over the range that the workload will use."""
    most = limits.num_slots
    some = (1, max(1, most // 2), most)
    samples = []
    for _ in range(NUM_ROUNDS):
        samples += [await decoding(engine, num, prompt, 30) for num in some for prompt in (32, 200)]
        samples += [await reading(engine, limits, prompt) for prompt in (16, 100, 200)]
    return samples


async def play(engine: Engine, trace: Trace) -> tuple[list[Stream], float]:
    begin = time.perf_counter()

    async def later(number: int) -> Stream:
        await asyncio.sleep(max(0.0, float(trace.arrivals[number]) - (time.perf_counter() - begin)))
        return await stream(engine, int(trace.prompts[number]), int(trace.answers[number]))

    streams = list(await asyncio.gather(*(later(number) for number in range(len(trace.arrivals)))))
    return streams, max(each.times[-1] for each in streams) - (begin + float(trace.arrivals[0]))


def steps_of(streams: list[Stream], trace: Trace) -> list[Sample]:
    """The engine's steps, as the times of the tokens show them, in samples of several alike ones."""
    tokens = sorted((when, number, index) for number, each in enumerate(streams) for index, when in enumerate(each.times))
    alike: dict[tuple[bool, int], list[Sample]] = defaultdict(list)
    end, step = 0.0, [tokens[0]]
    for token in [*tokens[1:], (float("inf"), -1, 0)]:
        if token[0] - step[0][0] < ONE_STEP_S and token[1] not in {number for _, number, _ in step}:
            step.append(token)
            continue
        found = _step(step, end, streams, trace)
        alike[found.prefill_tokens > 0, round(found.rows)].append(found)
        end, step = step[0][0], [token]
    return [_sum(kind[first : first + NUM_SUMMED]) for kind in alike.values() for first in range(0, len(kind), NUM_SUMMED)]


def _step(step: list[tuple[float, int, int]], before: float, streams: list[Stream], trace: Trace) -> Sample:
    """It began when the one before ended, or when its first prompt came to an idle engine."""
    first = [number for _, number, index in step if index == 0]
    going = [(number, index) for _, number, index in step if index > 0]
    begin = before if going else max(before, min(streams[number].sent for number in first))
    return Sample(
        seconds=step[0][0] - begin,
        prefill_tokens=float(sum(trace.prompts[number] for number in first)),
        rows=len(going),
        context_tokens=float(sum(trace.prompts[number] + index for number, index in going)),
    )


def _sum(samples: list[Sample]) -> Sample:
    return Sample(**{name: sum(getattr(each, name) for each in samples) for name in Sample.__dataclass_fields__})


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
        samples = steps_of(real[0], trace)
        cost = fit(samples)
        report(load, trace, cost, samples, share)
        costs.append(cost)
        rows += compare(load, trace, cost, limits, real)
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
    expected = [cost.seconds(each.prefill_tokens, each.rows, each.context_tokens) + (each.steps - 1) * cost.fixed for each in samples]
    spread = np.std([found / sample.seconds - 1 for found, sample in zip(expected, samples, strict=True)])
    style = "yellow" if others > DISTURBED else "dim"
    console.print(f"load {load:.0%}: everything else on the machine took {others:.0%} of a core", style=style)
    console.print(f"load {load:.0%}, {len(trace.arrivals)} requests; a step: {1000 * cost.fixed:.2f} ms,", style="dim")
    console.print(f"{1e6 * cost.per_prefill_token:.0f} us per prompt token, {1000 * cost.per_row:.2f} ms per stream,", style="dim")
    console.print(f"{1e6 * cost.per_context_token:.2f} us per position; fits {len(samples)} samples to {spread:.1%}", style="dim")


def workload(rate: float, requests: int) -> Trace:
    return poisson(rate=rate, num=requests, prompt="16-160", answer="8-32", seed=7)


def requests_per_s(cost: StepCost, limits: Limits) -> float:
    """What the engine ends per second when requests never run out."""
    return 300 / simulate(workload(1e6, 300), cost, limits).seconds


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
