"""Two nodes that do not share R1RAY_HOME: the job ends before a model is loaded, once, and says which node it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("homes.py")


def test_a_node_with_another_home_ends_the_job_with_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("hiding a directory from a node needs root")
    environment = os.environ | {"R1RAY_HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(SCRIPT), str(tiny_llama)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["kind"] == "HomeNotShared"
    assert f"on {socket.gethostname()} finds nothing at {tmp_path / 'home'}" in found["text"]
    assert "R1RAY_HOME" in found["text"]
