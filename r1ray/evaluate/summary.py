"""Rows of a report into figures: each metric, its interval, and the same by language and by intent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from r1ray.evaluate.config import MetricName
from r1ray.evaluate.shares import Share, interval, quotient

__all__ = ["METRICS", "by_group", "summarise"]

METRICS: tuple[str, ...] = get_args(MetricName)


def summarise(rows: Sequence[Mapping[str, Any]], *, num_bootstrap: int, seed: int) -> dict[str, float]:
    """`metric`, `metric_low` and `metric_high` (95 %), and `metric/zh`, `metric/en` where the set has both."""
    figures: dict[str, float] = {}
    for name, value in _figures(rows).items():
        figures[name] = value
        bounds = interval(_shares(rows, name), num=num_bootstrap, seed=seed, exponential=name == "perplexity")
        if bounds is not None:
            figures[f"{name}_low"], figures[f"{name}_high"] = bounds
    languages = by_group(rows, "language")
    if len(languages) > 1:
        figures |= {f"{name}/{language}": v for language, group in languages.items() for name, v in group.items() if name in METRICS}
    return figures


def by_group(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Value of `key` -> its metrics and `num_examples`; rows without one are left out. Sorted by value."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row[key] is not None:
            groups.setdefault(row[key], []).append(row)
    return {value: {**_figures(groups[value]), "num_examples": float(len(groups[value]))} for value in sorted(groups)}


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {name: quotient(_shares(rows, name), exponential=name == "perplexity") for name in METRICS}
    return {name: value for name, value in found.items() if value is not None}


def _shares(rows: Sequence[Mapping[str, Any]], name: str) -> list[Share]:
    return [Share(*row["shares"][name]) for row in rows if name in row["shares"]]
