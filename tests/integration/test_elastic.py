"""The number of workers follows the cluster: up when a node joins, down when one dies or announces that it will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("elastic.py")


def trained(model: Path, home: Path, scenario: str) -> dict[str, Any]:
    environment = os.environ | {"R1RAY_HOME": str(home), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(SCRIPT), str(model), scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    assert found["made"] == ["elastic@1"]
    return found


def check_curve(steps: list[list[float]], num_steps: int) -> None:
    """Every step is there, and what was trained twice gave the same loss, by whatever number of workers."""
    first: dict[float, float] = {}
    for step, loss in steps:
        assert loss == pytest.approx(first.setdefault(step, loss), rel=1e-4)
    assert sorted(first) == list(range(1, num_steps + 1))
    assert first[num_steps] < first[1]


def test_workers_grow_with_a_node_that_joins_and_shrink_when_it_dies(tiny_llama: Path, tmp_path: Path) -> None:
    found = trained(tiny_llama, tmp_path / "home", "grow-and-shrink")
    worlds = [world for _, world in found["saved"]]
    assert [world for place, world in enumerate(worlds) if place == 0 or worlds[place - 1] != world] == [1, 2, 1]
    check_curve(found["steps"], 120)


def test_a_node_that_announces_its_end_is_saved_for_and_counts_as_no_failure(tiny_llama: Path, tmp_path: Path) -> None:
    found = trained(tiny_llama, tmp_path / "home", "drain")
    assert {world for _, world in found["saved"]} == {1, 2}
    assert [step for step, _ in found["saved"] if step % 20], "saved when it was announced"
    check_curve(found["steps"], 180)
