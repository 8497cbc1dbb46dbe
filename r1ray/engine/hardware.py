"""What of the machine an engine takes: device, cores, threads."""

from __future__ import annotations

import logging
import os

import psutil

__all__ = ["choose_device", "choose_threads", "physical_cores"]

log = logging.getLogger(__name__)


def choose_device(wanted: str) -> str:
    """`auto` is a GPU when one is visible."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_threads(wanted: int | None, *, num_ranks: int = 1) -> int:
    """`wanted`, else the physical cores that this process may use, over the tensor ranks that compute on them at the same time.

    Ray sets OMP_NUM_THREADS to the CPUs that an actor reserves, and to 1 for a job's driver. A reservation is book-keeping: left
    alone, torch would compute on one core of many.
    """
    if wanted is not None:
        return wanted
    num_threads = max(1, physical_cores() // num_ranks)
    log.info("engine threads: %d (this process's physical cores; set engine.num_threads where processes share them)", num_threads)
    return num_threads


def physical_cores() -> int:
    """That this process may use."""
    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
