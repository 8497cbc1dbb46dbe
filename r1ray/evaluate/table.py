"""Reports side by side on the terminal; the first is what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from r1ray.evaluate.summary import METRICS
from r1ray.types import Report

__all__ = ["comparison", "show"]

LOWER_IS_BETTER = frozenset({"perplexity"})
LAST_ROWS = ("mean_answer_tokens", "tokens_per_second")
_LOG_WIDTH = 120  # a job's log is no terminal and has none


def comparison(reports: Sequence[Report]) -> Table:
    """A row per metric, a column per model; from the second on with the difference and, where known, the 95 % interval."""
    first = reports[0]
    table = Table(title=f"{first.num_examples} examples of {first.dataset}", title_justify="left")
    table.add_column("metric", overflow="fold")
    for report in reports:
        table.add_column(report.model, justify="right", overflow="fold")
    names = [n for n in METRICS if any(n in r.metrics for r in reports)] + [n for n in LAST_ROWS if n in first.metrics]
    for name in names:
        table.add_row(name, _cell(first, name), *(_cell(r, name, against=first) for r in reports[1:]))
    return table


def show(reports: Sequence[Report]) -> None:
    """As many models side by side as fit without wrapping a figure, the others below, each time beside the first."""
    console = Console()
    console = console if console.is_terminal else Console(width=_LOG_WIDTH)
    first, others = reports[0], reports[1:]
    while True:
        num = next((n for n in range(len(others), 1, -1) if _fits(comparison([first, *others[:n]]), console)), 1)
        console.print(comparison([first, *others[:num]]))
        others = others[num:]
        if not others:
            return


def _fits(table: Table, console: Console) -> bool:
    """As wide as it would like to be, which rich tells only where there is room for it."""
    return console.measure(table, options=console.options.update(width=10 * console.width)).maximum <= console.width


def _cell(report: Report, name: str, against: Report | None = None) -> str:
    value = report.metrics.get(name)
    if value is None:
        return "-"
    text = _number(value)
    if f"{name}_low" in report.metrics:
        text += f" [dim]({_number(report.metrics[f'{name}_low'])}-{_number(report.metrics[f'{name}_high'])})[/dim]"
    before = against.metrics.get(name) if against is not None else None
    return text if before is None or name in LAST_ROWS else f"{text} {_difference(value - before, name)}"


def _difference(difference: float, name: str) -> str:
    if abs(difference) < 5e-4:
        return "[dim]±0[/dim]"
    colour = "green" if (difference < 0) == (name in LOWER_IS_BETTER) else "red"
    return f"[{colour}]{'+' if difference > 0 else '-'}{_number(abs(difference))}[/{colour}]"


def _number(value: float) -> str:
    if value >= 1e5:
        return f"{value:.3g}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
