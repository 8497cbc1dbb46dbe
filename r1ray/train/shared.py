"""Whether every worker sees the run's directory as the driver does: asked before anything is loaded.

Each node of a cluster has a directory of the same name, and nothing but a look tells one shared directory from many. The driver lays a
token down, every rank reads it and lays one of its own beside it, and rank 0 looks for those. Knows no model and no Ray.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r1ray.errors import HomeNotShared
from r1ray.train.peers import Peers

__all__ = ["check", "offered"]

_PLACE = ".shared"
_DRIVER = "driver"
_PATIENCE_S = 5.0
"""A network file system may show a new file that much later on another node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Of one rank: where it runs, what it wrote, what went wrong."""

    host: str
    written: str
    problem: str | None


@contextmanager
def offered(run_directory: Path) -> Iterator[str]:
    """The driver's side: a token that workers can find for as long as the block lasts."""
    token = secrets.token_hex(8)  # a name that was never looked up, so that no cache of a network file system knows it is not there
    shutil.rmtree(run_directory / _PLACE, ignore_errors=True)
    (run_directory / _PLACE / token).mkdir(parents=True)
    (run_directory / _PLACE / token / _DRIVER).touch()
    try:
        yield token
    finally:
        shutil.rmtree(run_directory / _PLACE, ignore_errors=True)


def check(run_directory: Path, token: str, peers: Peers) -> None:
    """A worker's side; all ranks together.

    Raises:
        HomeNotShared: on all ranks, when one of them has another directory there.
    """
    place = run_directory / _PLACE / token
    mine = place / f"rank{peers.rank}-{secrets.token_hex(4)}"
    answers = peers.gathered(_Answer(host=socket.gethostname(), written=mine.name, problem=_problem(place, mine)))
    verdict = peers.told(_verdict(place, answers) if peers.rank == 0 else None)
    with contextlib.suppress(OSError):
        mine.unlink()
    if verdict is not None:
        error = HomeNotShared(verdict)
        error.agreed = True  # type: ignore[attr-defined]
        raise error


def _problem(place: Path, mine: Path) -> str | None:
    if not _appears(place / _DRIVER):
        return f"finds nothing at {place}, where the driver has just written"
    try:
        mine.touch()
    except OSError as error:
        return f"cannot write to {place}: {error.strerror}"
    return None


def _verdict(place: Path, answers: list[_Answer]) -> str | None:
    """Rank 0's, which sees what the driver sees."""
    for rank, answer in enumerate(answers):
        problem = answer.problem
        if problem is None and not _appears(place / answer.written):
            problem = f"wrote to {place}, and worker 0 on {answers[0].host} does not see it"
        if problem is not None:
            return (
                f"R1RAY_HOME is not one directory for all nodes: worker {rank} on {answer.host} {problem}. Mount a file system that all "
                "nodes share, set R1RAY_HOME to a directory on it (the same path everywhere) and submit the job again."
            )
    return None


def _appears(path: Path) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True
