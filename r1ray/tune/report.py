"""Results as people read them: a table on the terminal, CSV and JSON files, a picture of the front. Decides nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1ray.types import Sampling

__all__ = ["Setting", "print_rows", "print_settings", "write_front_plot", "write_rows"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measured sampling setting. `gain` is its quality less the baseline's, `gain_at_least` what it surely is (noise.py)."""

    name: str
    sampling: Sampling
    quality: float
    latency_s: float
    quality_se: float = 0.0
    gain: float = 0.0
    gain_at_least: float = 0.0
    source: str = "Optuna"
    metrics: Mapping[str, float] = field(default_factory=dict)
    on_front: bool = False
    is_chosen: bool = False
    is_baseline: bool = False

    @property
    def figures(self) -> dict[str, float]:
        """What it is judged by."""
        names = ("quality", "quality_se", "gain", "gain_at_least", "latency_s")
        return {name: getattr(self, name) for name in names}

    def row(self) -> dict[str, Any]:
        """Flat, for CSV, JSON and MLflow."""
        fields = self.sampling.model_dump(exclude={"stop", "seed"})
        own = {"name": self.name, **self.figures, "on_front": self.on_front, "chosen": self.is_chosen}
        return {**own, **fields, **self.metrics, "source": self.source}


def print_settings(settings: Sequence[Setting]) -> None:
    """Best quality first; the front is marked, the chosen one starred."""
    rows = []
    for setting in sorted(settings, key=lambda s: (-s.quality, s.latency_s)):
        sampling = setting.sampling
        mark = "* chosen" if setting.is_chosen else "front" if setting.on_front else ""
        rows.append(
            {
                "setting": setting.name,
                "quality": f"{setting.quality:.3f} ± {setting.quality_se:.3f}",
                "gain": "" if setting.is_baseline else f"{setting.gain:+.3f}",
                "at least": "baseline" if setting.is_baseline else f"{setting.gain_at_least:+.3f}",
                "latency s": setting.latency_s,
                "temp": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "repet": sampling.repetition_penalty,
                "freq": sampling.frequency_penalty,
                "pres": sampling.presence_penalty,
                "max": sampling.max_tokens,
                "": mark,
            }
        )
    print_rows(rows, "Sampling settings")


def print_rows(rows: Sequence[Row], title: str) -> None:
    """A table as wide as it needs to be: a job's log has no terminal whose width could be asked."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=200).print(table)


def write_rows(rows: Sequence[Row], directory: Path, stem: str) -> list[Path]:
    """`stem`.csv and `stem`.json with the same rows; columns in order of first appearance."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table, tree = directory / f"{stem}.csv", directory / f"{stem}.json"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    tree.write_text(json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [table, tree]


def write_front_plot(settings: Sequence[Setting], limit_s: float, path: Path) -> Path:
    """Quality over latency as PNG: every setting, the front as a line, the latency limit, the chosen one ringed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter([s.latency_s for s in settings], [s.quality for s in settings], color="#9aa5b1", label="settings")
    front = sorted((s for s in settings if s.on_front), key=lambda s: s.latency_s)
    axes.plot([s.latency_s for s in front], [s.quality for s in front], "o-", color="#1f6feb", label="Pareto front")
    chosen = [s for s in settings if s.is_chosen]
    axes.scatter([s.latency_s for s in chosen], [s.quality for s in chosen], s=160, facecolors="none", edgecolors="#d1242f", label="chosen")
    axes.axvline(limit_s, linestyle="--", color="#9aa5b1", label="latency limit")
    for setting in settings:
        axes.annotate(setting.name, (setting.latency_s, setting.quality), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="latency, seconds per answer", ylabel="quality")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _text(value: Any) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
