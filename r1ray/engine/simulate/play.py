"""A trace played by the engine's rules: streams share every step, prompts are read in pieces beside them, a stream keeps its slot, and
when the KV cache is full the youngest stream gives its blocks back and is computed again later.

Between two events all steps are alike, so they are taken in one leap: ten thousand requests take about a second.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from r1ray.engine.simulate.arrivals import Trace
from r1ray.engine.simulate.costs import StepTime
from r1ray.errors import InvalidValue

__all__ = ["Limits", "Outcome", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the scheduler; the engine's settings of the same names.

    With nobody decoding a step reads `idle_factor` x `prefill_chunk` prompt tokens, since nobody waits for it.
    """

    num_slots: int
    prefill_chunk: int = 256
    idle_factor: int = 4
    cache_tokens: int | None = None
    max_waiting: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Per finished request in seconds, and totals. NaN for the TPOT of one-token answers."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]
    total: NDArray[np.float64]
    queued: NDArray[np.float64]
    seconds: float
    num_tokens: int
    num_steps: int
    num_rejected: int
    num_preempted: int
    mean_running: float
    most_waiting: int
    most_cached: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def percentiles(self, shares: Iterable[float] = (50, 90, 99)) -> dict[str, dict[str, float]]:
        """`{"ttft": {"p50": ...}, ...}` in seconds; empty when nothing finished."""
        named = {"ttft": self.ttft, "tpot": self.tpot, "total": self.total, "queued": self.queued}
        kept = {name: values[~np.isnan(values)] for name, values in named.items()}
        return {
            name: {f"p{share:g}": float(np.percentile(values, share)) for share in shares} for name, values in kept.items() if len(values)
        }

    def summary(self) -> dict[str, object]:
        """Everything but the single requests, for JSON."""
        totals = {key: value for key, value in asdict(self).items() if not isinstance(value, np.ndarray)}
        return {**totals, "num_finished": len(self.ttft), "tokens_per_s": self.tokens_per_s, **self.percentiles()}


def simulate(trace: Trace, cost: StepTime, limits: Limits) -> Outcome:
    """Play the trace to its end.

    Raises:
        InvalidValue: a request that could never fit into the KV cache.
    """
    longest = int((trace.prompts + trace.answers).max())
    if limits.cache_tokens is not None and longest > limits.cache_tokens:
        raise InvalidValue(
            f"A request of {longest} tokens never fits into a cache of {limits.cache_tokens}. Raise the cache or cut lengths."
        )
    run = _Run(trace, cost, limits)
    while run.advance():
        pass
    return run.outcome()


@dataclass(slots=True)
class _Job:
    """A request on its way; after a preemption `prompt` has grown by what it had generated and `answer` has shrunk."""

    number: int
    prompt: int
    answer: int
    computed: int = 0
    ends_at: int = 0


@dataclass(slots=True)
class _Run:
    trace: Trace
    cost: StepTime
    limits: Limits
    now: float = 0.0
    step: int = 0
    arrived: int = 0
    cached: int = 0
    """Positions in the KV cache, of prompts being read in full."""
    context: int = 0
    """Positions that the next decoding step attends to."""
    waiting: deque[_Job] = field(default_factory=deque)
    reading: list[_Job] = field(default_factory=list)
    decoding: dict[int, _Job] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    begun: dict[int, float] = field(default_factory=dict)
    done: dict[int, float] = field(default_factory=dict)
    num_rejected: int = 0
    num_preempted: int = 0
    busy: float = 0.0
    most_waiting: int = 0
    most_cached: int = 0

    def advance(self) -> bool:
        """1. let arrivals in  2. give free slots away  3. one mixed step, or a leap of alike ones. False when all is done."""
        self._arrive()
        self._admit()
        if self.reading:
            self._mixed_step()
        elif self.decoding:
            self._leap()
        elif self.arrived < len(self.trace.arrivals):
            self.now = float(self.trace.arrivals[self.arrived])
        else:
            return False
        return True

    @property
    def _room(self) -> float:
        return math.inf if self.limits.cache_tokens is None else self.limits.cache_tokens - self.cached

    def _arrive(self) -> None:
        while self.arrived < len(self.trace.arrivals) and self.trace.arrivals[self.arrived] <= self.now:
            number, self.arrived = self.arrived, self.arrived + 1
            free = self.limits.num_slots - len(self.decoding) - len(self.reading)
            if self.limits.max_waiting is not None and len(self.waiting) >= self.limits.max_waiting + free:
                self.num_rejected += 1
                continue
            self.waiting.append(_Job(number, int(self.trace.prompts[number]), int(self.trace.answers[number])))

    def _admit(self) -> None:
        while self.waiting and len(self.decoding) + len(self.reading) < self.limits.num_slots and self.waiting[0].prompt < self._room:
            job = self.waiting.popleft()
            self.begun.setdefault(job.number, self.now)
            self.cached += job.prompt
            self.reading.append(job)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def _mixed_step(self) -> None:
        """One piece of the oldest prompts, and a token for everybody who decodes."""
        self._make_room(1)
        budget = self.limits.prefill_chunk * (1 if self.decoding else self.limits.idle_factor)
        read = 0
        for job in self.reading:
            piece = min(budget - read, job.prompt - job.computed)
            job.computed, read = job.computed + piece, read + piece
        self._pass(self.cost.seconds(read, len(self.decoding), self.context))
        self._grow(1)
        for job in [job for job in self.reading if job.computed == job.prompt]:
            self.reading.remove(job)
            self._begin_decoding(job)

    def _begin_decoding(self, job: _Job) -> None:
        self.first.setdefault(job.number, self.now)
        if job.answer == 1:
            self._finish(job, held=job.prompt)
            return
        job.ends_at = self.step + job.answer - 1
        self.decoding[job.number] = job
        self.cached += 1
        self.context += job.prompt + 1
        heapq.heappush(self.ends, (job.ends_at, job.number))

    def _leap(self) -> None:
        """As many steps as there are until a stream ends, the cache is full, or an arrival finds a slot."""
        self._make_room(1)
        while self.ends[0][1] not in self.decoding or self.decoding[self.ends[0][1]].ends_at != self.ends[0][0]:
            heapq.heappop(self.ends)  # left by a preemption
        rows = len(self.decoding)
        num = self.ends[0][0] - self.step
        if self.limits.cache_tokens is not None:
            num = min(num, max(1, int(self._room // rows)))
        if rows < self.limits.num_slots and self.arrived < len(self.trace.arrivals):
            num = min(num, self._steps_until(float(self.trace.arrivals[self.arrived]), rows))
        self._pass(self._leap_seconds(num, rows), num)
        self._grow(num)

    def _leap_seconds(self, num: int, rows: int) -> float:
        """Each step attends to `rows` more positions than the one before."""
        first = self.cost.seconds(0, rows, self.context)
        return num * (first + self.cost.seconds(0, rows, self.context + (num - 1) * rows)) / 2

    def _steps_until(self, moment: float, rows: int) -> int:
        """The first number of steps after which it is `moment` or later: the root of a quadratic."""
        first = self.cost.seconds(0, rows, self.context)
        square = (self.cost.seconds(0, rows, self.context + rows) - first) / 2
        linear, gap = first - square, moment - self.now
        root = gap / linear if square <= 1e-12 * linear else (math.sqrt(linear**2 + 4 * square * gap) - linear) / (2 * square)
        return max(1, math.ceil(root - 1e-9))

    def _make_room(self, num: int) -> None:
        """Before `num` steps: the youngest streams give their blocks back until the rest can grow."""
        while self.limits.cache_tokens is not None and self.decoding and self._room < num * len(self.decoding):
            if len(self.decoding) == 1 and self.reading:
                job = self.reading.pop()
                self.cached -= job.prompt
                job.computed = 0
            else:
                job = self.decoding.pop(next(reversed(self.decoding)))
                held = job.prompt + job.answer - (job.ends_at - self.step)
                self.cached, self.context = self.cached - held, self.context - held
                job = _Job(job.number, held, job.ends_at - self.step)
            self.waiting.appendleft(job)
            self.num_preempted += 1

    def _grow(self, num: int) -> None:
        """Everybody has `num` tokens more; who has all of them leaves."""
        rows = len(self.decoding)
        self.cached += num * rows
        self.context += num * rows
        self.most_cached = max(self.most_cached, self.cached)
        while self.ends and self.ends[0][0] <= self.step:
            ends_at, number = heapq.heappop(self.ends)
            job = self.decoding.get(number)
            if job is not None and job.ends_at == ends_at:
                del self.decoding[number]
                self.context -= job.prompt + job.answer
                self._finish(job, held=job.prompt + job.answer)

    def _finish(self, job: _Job, *, held: int) -> None:
        self.cached -= held
        self.done[job.number] = self.now

    def _pass(self, seconds: float, num: int = 1) -> None:
        self.now += seconds
        self.step += num
        self.busy += seconds * (len(self.decoding) + len(self.reading))

    def outcome(self) -> Outcome:
        numbers = np.array(sorted(self.done), dtype=np.int64)
        arrivals, answers = self.trace.arrivals[numbers], self.trace.answers[numbers]
        first, last, begun = (np.array([times[n] for n in numbers]) for times in (self.first, self.done, self.begun))
        tpot = np.where(answers > 1, (last - first) / np.maximum(1, answers - 1), np.nan)
        span = float(self.now - self.trace.arrivals[0])
        return Outcome(
            ttft=first - arrivals,
            tpot=tpot,
            total=last - arrivals,
            queued=begun - arrivals,
            seconds=span,
            num_tokens=int(answers.sum()),
            num_steps=self.step,
            num_rejected=self.num_rejected,
            num_preempted=self.num_preempted,
            mean_running=self.busy / span if span else 0.0,
            most_waiting=self.most_waiting,
            most_cached=self.most_cached,
        )
