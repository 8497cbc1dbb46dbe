"""What jobs/prepare_data.py runs: the preparation, a table here, a JSON report beside the output, an MLflow run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1ray.data.diversity import Embedder
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.pipeline import Prepared, prepare
from r1ray.observe.tracking import Run
from r1ray.settings import Settings

__all__ = ["prepare_data"]

EXPERIMENT = "prepare"


def prepare_data(config: PrepareConfig, settings: Settings | None = None, *, embed: Embedder | None = None) -> Prepared:
    """Prepare, report, record. Raises what `prepare` raises."""
    settings = settings or Settings()
    if not config.track:
        return _done(config, prepare(config, settings, embed=embed))
    with Run(EXPERIMENT, config.out.stem, settings=settings) as run:
        run.log_params(config.model_dump(mode="json"))
        result = prepare(config, settings, embed=embed)
        run.log_metrics(dict(_figures(result.report)))
        run.log_dict(result.report, "report.json")
    return _done(config, result)


def _done(config: PrepareConfig, result: Prepared) -> Prepared:
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # a job's log has no width
    for table in _tables(result.report):
        console.print(table)
    report = result.rejects.with_name(result.rejects.name.replace(".rejects.jsonl", ".report.json"))
    _write(report, config, result.report)
    if result.out is not None:
        print(f"rows: {result.out}", flush=True)
    print(f"rejects: {result.rejects}\nreport: {report}", flush=True)
    return result


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    if report["sources"]:
        yield _sources(report["sources"])
    table = Table(title="result", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _figures(report):
        table.add_row(name, f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}")
    yield table


def _sources(sources: Mapping[str, Any]) -> Table:
    """A row per source, a column per rule that dropped something."""
    steps = list(dict.fromkeys(step for figures in sources.values() for step in figures["dropped"]))
    table = Table(title="rows by source", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("in", *steps, "kept"):
        table.add_column(name, justify="right")
    for source, figures in sources.items():
        dropped = [figures["dropped"].get(step, 0) for step in steps]
        table.add_row(source, *(f"{number:,}" for number in (figures["in"], *dropped, figures["in"] - sum(dropped))))
    return table


def _figures(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of the report under a dotted name; the sources have a table of their own."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and name != "sources":
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}".replace("#", "_"), float(value)


def _write(path: Path, config: PrepareConfig, report: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    tree = {"created_at": datetime.now(UTC).isoformat(timespec="seconds"), "config": config.model_dump(mode="json"), **report}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(tree, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)
