"""The learning curve as a file: rank 0 appends a line per step, the driver follows it into the job log and MLflow.

`progress.jsonl` in the run's directory outlives every process; after a resume, a step that was repeated has a second line,
which must equal the first. Knows no trainer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from r1ray.train.standing import MARK

__all__ = ["FILE", "Curve", "Follower", "Step", "curve", "line"]

FILE = "progress.jsonl"
_SHOWN_MARKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step. `tokens` counts the batch without padding, `elapsed_s` all training time of the run so far."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    elapsed_s: float
    remaining_s: float
    marks: Mapping[str, float] = field(default_factory=dict)
    """What else its objective tells: rewards, margins, ..."""

    def metrics(self) -> dict[str, float]:
        """What dashboards plot."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        usual = {"loss": self.loss, "learning_rate": self.learning_rate, "grad_norm": self.grad_norm, "tokens_per_second": rate}
        return {**usual, **self.marks}


class Curve:
    """Writer of the file; one open handle, a flush per step."""

    def __init__(self, run_directory: Path) -> None:
        self._stream = (run_directory / FILE).open("a", encoding="utf-8")

    def write(self, step: Step) -> None:
        self._stream.write(json.dumps(asdict(step)) + "\n")
        self._stream.flush()


def curve(run_directory: Path) -> list[Step]:
    """Every step of a run, the last line of each, in order."""
    path = run_directory / FILE
    if not path.exists():
        return []
    steps = {step.step: step for step in _parsed(path.read_text(encoding="utf-8"))}
    return [steps[number] for number in sorted(steps)]


def line(steps: list[Step]) -> str:
    """`step 20/144  loss 1.2345  lr 1.9e-03  482 tokens/s  2:05 left`, loss and speed over `steps`, the rest of the last one."""
    last = steps[-1]
    loss = sum(step.loss for step in steps) / len(steps)
    rate = sum(step.tokens for step in steps) / max(sum(step.seconds for step in steps), 1e-9)
    minutes, seconds = divmod(round(last.remaining_s), 60)
    speed = f"{rate:.0f} tokens/s  {minutes}:{seconds:02d} left"
    names = [name for name in last.marks if name != MARK][:_SHOWN_MARKS] + [MARK] * (MARK in last.marks)
    marks = "".join(f"{name} {_mean(steps, name):.3f}  " for name in names)
    return f"step {last.step}/{last.total_steps}  loss {loss:.4f}  {marks}lr {last.learning_rate:.1e}  {speed}"


class Follower:
    """Context manager: calls `on_steps` from a thread with each `every` new steps, and with the rest at the end."""

    def __init__(self, run_directory: Path, on_steps: Callable[[list[Step]], None], *, every: int, poll_s: float = 0.5) -> None:
        self._path = run_directory / FILE
        self._on_steps, self._every, self._poll_s = on_steps, every, poll_s
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._pending: list[Step] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._read()
        if self._pending:
            self._flush()

    def _follow(self) -> None:
        while not self._over.wait(self._poll_s):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8") as stream:
            stream.seek(self._offset)
            text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        self._offset += len(whole.encode())
        for step in _parsed(whole):
            self._pending.append(step)
            if step.step % self._every == 0 or step.step == 1 or MARK in step.marks:
                self._flush()

    def _flush(self) -> None:
        steps, self._pending = self._pending, []
        self._on_steps(steps)


def _mean(steps: list[Step], mark: str) -> float:
    values = [step.marks[mark] for step in steps if mark in step.marks]
    return sum(values) / len(values)


def _parsed(text: str) -> Iterator[Step]:
    """A last line that a killed writer left unfinished is no step."""
    for row in text.splitlines():
        try:
            yield Step(**json.loads(row))
        except (ValueError, TypeError):
            continue
