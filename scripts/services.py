"""The servers that a script starts, waits for and stops again, each in a session of its own with its output in a log file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r1ray.errors import R1RayError

__all__ = ["LOOPBACK", "Service", "StepFailed", "answers", "console", "free_port"]

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = "127.0.0.1"
console = Console(soft_wrap=True, highlight=False)


class StepFailed(R1RayError):
    """A step's command ended with an error; its own output says why."""


class Service:
    """A process that stays up while the quickstart runs; stopped by its own pid, its output kept in a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, url: str) -> None:
        self.name, self.log, self.url = name, log, url
        self._asked = False
        self._output = log.open("wb")
        self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)

    def wait(self, timeout_s: float) -> None:
        """Until its URL answers 200; says every 10 s what it is waiting for."""
        start = time.monotonic()
        told = start
        while not answers(self.url):
            if self._process.poll() is not None:
                raise StepFailed(
                    f"{self.name} ended with code {self._process.returncode} before {self.url} answered. Its log: {self.log}\n{self.tail()}"
                )
            now = time.monotonic()
            if now - start > timeout_s:
                raise StepFailed(f"{self.name} did not answer at {self.url} within {timeout_s:.0f} s. Its log: {self.log}\n{self.tail()}")
            if now - told >= 10:
                told = now
                console.print(f"    waiting for {self.name} at {self.url} ({now - start:.0f} s)", style="dim")
            time.sleep(0.25)

    def tail(self, num_lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def ask_to_stop(self, how: signal.Signals) -> None:
        if self._process.poll() is None:
            self._asked = True
            self._process.send_signal(how)

    def stop(self, timeout_s: float = 10) -> None:
        """SIGTERM to the process unless it was asked already; after `timeout_s`, SIGKILL to its whole session."""
        if not self._asked:
            self.ask_to_stop(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port(preferred: int) -> int:
    """`preferred`, or the next port nobody listens on, which is said aloud."""
    for port in range(preferred, preferred + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((LOOPBACK, port)) == 0:
                continue
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                if port != preferred:
                    console.print(f"    port {preferred} is in use: taking {port}", style="dim")
                return port
    raise StepFailed(f"No free port in {preferred}-{preferred + 49}. End the servers that listen there.")
