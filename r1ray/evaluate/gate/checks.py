"""Figures and limits -> checks that passed or failed, each in words. Knows no model, no file and no registry.

A regression is judged by the difference of the two versions' figures on the same examples; its 95 % interval (paired bootstrap: both
versions resampled with the same examples) is shown beside it, so that a reader sees how much of it is the choice of examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r1ray.errors import EvaluationError
from r1ray.evaluate.shares import Share, quotient

__all__ = ["Check", "limits", "regressions"]

LOWER_IS_BETTER = frozenset({"perplexity", "over_refusal_rate"})
_RELATIVE = frozenset({"perplexity"})

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the verdict. `what` names set and metric, `said` is the whole finding in words."""

    what: str
    passed: bool
    value: float
    limit: float
    said: str


def limits(name: str, metrics: Mapping[str, float], at_least: Mapping[Any, float], at_most: Mapping[Any, float]) -> list[Check]:
    """Raises EvaluationError: a metric that the set's gold answers do not allow."""
    checks = []
    for bounds, is_lower in ((at_least, True), (at_most, False)):
        for metric, limit in bounds.items():
            value = _measured(name, metric, metrics)
            passed = value >= limit if is_lower else value <= limit
            said = f"{metric} {value:.4g}, {'at least' if is_lower else 'at most'} {limit:.4g} wanted"
            checks.append(Check(what=f"{name}/{metric}", passed=passed, value=value, limit=limit, said=said))
    return checks


def regressions(name: str, candidate: Rows, reference: Rows, max_drop: Mapping[Any, float], *, num: int, seed: int) -> list[Check]:
    """The candidate's rows against the reference's, which answer the same examples in the same order.

    Raises:
        EvaluationError: the examples differ, or a metric cannot be had from them.
    """
    if [row["id"] for row in candidate] != [row["id"] for row in reference]:
        raise EvaluationError(f"The two versions were measured on different examples of {name}. This is a defect.")
    checks = []
    for metric, allowed in max_drop.items():
        new, old = _shares(candidate, metric), _shares(reference, metric)
        drop = _drop(metric, new, old)
        if drop is None:
            raise EvaluationError(f"The set {name} has no {metric}: its gold answers do not allow it. Take it out of sets.{name}.max_drop.")
        bounds = _interval(metric, new, old, num, seed)
        spread = f" (95 %: {bounds[0]:+.3g} to {bounds[1]:+.3g})" if bounds else ""
        before, after = (quotient(shares, exponential=metric == "perplexity") for shares in (old, new))
        kind = "share" if metric in _RELATIVE else "drop"
        said = f"{metric} {before:.4g} -> {after:.4g}, {kind} {drop:+.3g}{spread}, at most {allowed:.3g} allowed"
        checks.append(Check(what=f"{name}/{metric} regression", passed=drop <= allowed, value=drop, limit=allowed, said=said))
    return checks


def _measured(name: str, metric: str, metrics: Mapping[str, float]) -> float:
    if metric not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        raise EvaluationError(f"The set {name} has no {metric}: its gold answers do not allow it. It has {known}; name one of those.")
    return metrics[metric]


def _shares(rows: Rows, metric: str) -> list[Share]:
    """One per row, so that two versions' resamples pair; a row without the metric counts nothing."""
    return [Share(*row["shares"].get(metric, (0.0, 0.0))) for row in rows]


def _drop(metric: str, new: Sequence[Share], old: Sequence[Share]) -> float | None:
    """How much worse: positive is worse, whichever way the metric points."""
    after, before = (quotient(shares, exponential=metric == "perplexity") for shares in (new, old))
    if after is None or before is None:
        return None
    difference = after - before if metric in LOWER_IS_BETTER else before - after
    return difference / before if metric in _RELATIVE else difference


def _interval(metric: str, new: Sequence[Share], old: Sequence[Share], num: int, seed: int) -> tuple[float, float] | None:
    rng = np.random.default_rng(seed)
    drops = []
    for _ in range(num):
        chosen = rng.integers(len(new), size=len(new))
        drop = _drop(metric, [new[i] for i in chosen], [old[i] for i in chosen])
        if drop is not None:
            drops.append(drop)
    if not drops:
        return None
    low, high = np.percentile(drops, [2.5, 97.5])
    return float(low), float(high)
