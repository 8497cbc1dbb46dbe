"""What is judged and what comes out: answers in, one number per answer and reward; the advantage made of them.

Knows no model and no trainer. A judge sees all answers of a rank's step at once, so that it can compare those of one group and a
reward model can compute them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from r1ray.errors import TrainingError
from r1ray.types import Message

__all__ = ["EPSILON", "Answer", "Judge", "Scale", "advantages", "column_names", "judged"]

EPSILON = 1e-4  # keeps an axis that does not vary within its group at zero instead of dividing by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to one prompt.

    `text` is all that was said, with a `<think>` that the template prefilled; `content` is the answer without its reasoning.
    Answers of one `group` answer the same prompt. `is_finished`: it ended by itself, not at the limit.
    """

    prompt: tuple[Message, ...]
    reference: str
    text: str
    content: str
    reasoning: str | None
    num_tokens: int
    is_finished: bool
    group: int

    @property
    def question(self) -> str:
        """The last turn before the answer."""
        return self.prompt[-1].content


class Judge(Protocol):
    """One reward."""

    def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """One finite number per answer, larger is better."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A judge with the name of its line and its weight."""

    name: str
    weight: float
    judge: Judge


def column_names(axes: Sequence[tuple[str, str]]) -> list[str]:
    """(axis, kind) of each reward -> the name of its line: the axis; where rewards share it with the kind, and a number if need be."""
    names: list[str] = []
    for axis, kind in axes:
        shared = sum(other == axis for other, _ in axes) > 1
        name = f"{axis}_{kind}" if shared else axis
        same = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def judged(scales: Sequence[Scale], answers: Sequence[Answer]) -> list[list[float]]:
    """One row per answer, one column per scale.

    Raises:
        TrainingError: a judge gave too many, too few, or no numbers.
    """
    columns = [_checked(scale, scale.judge.score(answers), len(answers)) for scale in scales]
    return [list(row) for row in zip(*columns, strict=True)]


def advantages(rewards: Sequence[Sequence[float]], weights: Sequence[float], group_size: int) -> list[float]:
    """What TRL's `normalize_then_sum` computes, for the reader and the tests (GDPO, arXiv 2601.05242).

    With r_k(i) the reward of answer i on axis k, m and s mean and (n - 1) deviation within its group, and eps = 1e-4:

        z_k(i) = (r_k(i) - m_k) / (s_k + eps)         each axis on its own
        z(i)   = sum over k of weight_k * z_k(i)
        A(i)   = (z(i) - mean(z)) / (std(z) + eps)    over the whole batch

    So an axis with large numbers does not drown one with small ones, and an axis on which a group agrees says nothing about it.
    """
    combined: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        columns = [_normal(column) for column in zip(*group, strict=True)]
        combined += [sum(w * z for w, z in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]
    return _normal(combined)


def _normal(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return [(value - mean) / (deviation + EPSILON) for value in values]


def _checked(scale: Scale, scores: Sequence[float], wanted: int) -> list[float]:
    numbers = [float(score) for score in scores]
    if len(numbers) != wanted or not all(map(math.isfinite, numbers)):
        bad = next((f"{number}" for number in numbers if not math.isfinite(number)), f"{len(numbers)} numbers")
        raise TrainingError(f"Reward {scale.name} gave {bad} for {wanted} answers. It has to give one finite number per answer.")
    return numbers
