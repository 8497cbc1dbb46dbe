"""The same question with another label or answer. Knows neither text nor file: a row is a question key and an answer key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Conflict", "conflicts"]

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Conflict:
    """One contradicted question: how many rows ask it, how many give the most frequent answer, and which answer stays (None: none)."""

    num_rows: int
    num_agreeing: int
    kept: int | None


def conflicts(questions: U64, answers: U64, priorities: npt.NDArray[np.uint8], rule: Literal["majority", "drop"]) -> dict[int, Conflict]:
    """Question key -> what became of it, for every question that has more than one answer.

    Rows of the smallest priority number decide among themselves: a new rule of the domain overrules what history says.
    majority keeps the answer of more than half of them, drop keeps none.
    """
    found: dict[int, Conflict] = {}
    order = np.lexsort((answers, priorities, questions))
    questions, answers, priorities = questions[order], answers[order], priorities[order]
    if not len(questions):
        return found
    starts = np.flatnonzero(np.r_[True, questions[1:] != questions[:-1]])
    ends = np.r_[starts[1:], len(questions)]
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several], strict=True):
        group = answers[start:end]
        if (group == group[0]).all():
            continue
        deciding = group[priorities[start:end] == priorities[start]]
        values, counts = np.unique(deciding, return_counts=True)
        most = int(counts.argmax())
        wins = counts[most] * 2 > len(deciding) and (rule == "majority" or len(values) == 1)
        found[int(questions[start])] = Conflict(len(group), int(counts[most]), int(values[most]) if wins else None)
    return found
