"""Who asks when, with how long a prompt, for how long an answer: drawn by chance, or read from a file."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1ray.errors import InvalidValue

__all__ = ["Trace", "lengths", "poisson", "read_trace"]

SPREAD = 0.6  # sigma of the log-normal that `~512` stands for: the 90th percentile is twice the median


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival: seconds, prompt tokens, answer tokens."""

    arrivals: NDArray[np.float64]
    prompts: NDArray[np.int64]
    answers: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.arrivals) == len(self.prompts) == len(self.answers) or len(self.arrivals) == 0:
            raise InvalidValue("A trace needs as many arrivals as prompts and answers, at least one. Mend the trace.")
        if (np.diff(self.arrivals) < 0).any() or (self.prompts < 1).any() or (self.answers < 1).any():
            raise InvalidValue("A trace's arrivals must not fall and its lengths must be at least 1. Sort it and drop empty requests.")


def lengths(text: str, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`512` always that; `128-1024` evenly between; `~512` log-normal around that median, as lengths of chats are.

    Raises:
        InvalidValue: another form.
    """
    try:
        if text.startswith("~"):
            drawn = np.exp(rng.normal(math.log(int(text[1:])), SPREAD, num))
            return np.maximum(1, np.rint(drawn)).astype(np.int64)
        low, _, high = text.partition("-")
        return rng.integers(int(low), int(high or low), num, endpoint=True)
    except ValueError as error:
        raise InvalidValue(f"{text!r} is no length: {error}. Write 512, 128-1024 or ~512.") from error


def poisson(*, rate: float, num: int, prompt: str, answer: str, seed: int) -> Trace:
    """`num` requests at `rate` per second on average, without memory; lengths as `lengths` reads them."""
    if rate <= 0 or num < 1:
        raise InvalidValue(f"rate {rate} and number {num} must be above 0. Raise them.")
    rng = np.random.default_rng(seed)
    return Trace(np.cumsum(rng.exponential(1 / rate, num)), lengths(prompt, num, rng), lengths(answer, num, rng))


def read_trace(path: Path) -> Trace:
    """A CSV with the columns arrival_s, prompt_tokens, answer_tokens.

    Raises:
        InvalidValue: the file is missing, lacks a column or has a value that is no number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["answer_tokens"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidValue(f"{path} is no trace: {error!r}. Give a CSV of arrival_s,prompt_tokens,answer_tokens.") from error
    arrivals, prompts, answers = zip(*rows, strict=True) if rows else ((), (), ())
    return Trace(np.array(arrivals, dtype=float), np.array(prompts, dtype=np.int64), np.array(answers, dtype=np.int64))
