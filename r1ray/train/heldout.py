"""What rows kept from training say before and after it: written by rank 0 into the run's directory, told by the driver.

Imports nothing heavy; knows no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["FILE", "note", "told"]

FILE = "held_out.json"


def note(run_directory: Path, when: str, figures: Mapping[str, float]) -> None:
    """Keep the figures `before` or `after`; those of the other time stay, which an earlier attempt may have written."""
    path = run_directory / FILE
    known = _read(path)
    unfinished = path.with_name(f".{FILE}")
    unfinished.write_text(json.dumps({**known, when: dict(figures)}), encoding="utf-8")
    unfinished.replace(path)


def told(run_directory: Path, say: Callable[[str], object]) -> dict[str, float]:
    """Each figure as `held_out_before/NAME` and `held_out_after/NAME`, and a line about it to `say`; empty where nothing was held out."""
    found = _read(run_directory / FILE)
    before, after = found.get("before", {}), found.get("after", {})
    for name, value in after.items():
        say(f"held out: {name} {before.get(name, math.nan):.3f} -> {value:.3f}")
    return {f"held_out_{when}/{name}": value for when, figures in found.items() for name, value in figures.items()}


def _read(path: Path) -> dict[str, dict[str, float]]:
    if not path.exists():
        return {}
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return found
