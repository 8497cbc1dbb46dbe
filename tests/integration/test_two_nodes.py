"""The whole path on two nodes: the workers of one training run and the replicas of one model spread over both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_train_and_serve_spread_over_two_nodes(tiny_llama: Path, tmp_path: Path) -> None:
    with socket.socket() as serve, socket.socket() as dashboard:
        for probe in (serve, dashboard):
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in (serve, dashboard)]
    environment = os.environ | {"R1RAY_HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    script = Path(__file__).with_name("two_nodes.py")
    command = [sys.executable, str(script), str(tiny_llama), *ports]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["version"] == "two-nodes@1"
    assert (found["train_nodes"], found["serve_nodes"]) == (2, 2)
    assert found["answer"]["usage"]["completion_tokens"] >= 1
    assert found["answer"]["choices"][0]["finish_reason"] in {"stop", "length"}
