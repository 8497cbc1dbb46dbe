"""What of the machine an engine takes: device, cores, threads. In a process that Ray started, what Ray has given it."""

from __future__ import annotations

import logging
import os
import sys

import psutil

from r1ray.engine.config import EngineConfig
from r1ray.errors import InvalidValue

__all__ = ["choose_device", "choose_threads", "engine_device", "physical_cores"]

log = logging.getLogger(__name__)


def engine_device(config: EngineConfig) -> str:
    """Where the config's engine computes; every process of a split one has the same kind of device.

    Raises:
        InvalidValue: the actors of a split model have GPUs and this process, which computes the last stage, has none.
    """
    if config.stages * config.tensor_parallel == 1 or config.type != "torch" or config.device != "auto":
        return choose_device(config.device)
    if not config.stage_gpus:
        log.info("engine device: cpu (split over actors with engine.stage_gpus=0)")
        return "cpu"
    if choose_device("auto") == "cpu":
        raise InvalidValue(
            f"engine.stage_gpus={config.stage_gpus:g}, and this process, which computes the last stage itself, has no GPU. Set "
            "placement.num_gpus in Serve, submit a job with --entrypoint-num-gpus, or set engine.device=cpu and stage_gpus=0."
        )
    return "cuda"


def choose_device(wanted: str) -> str:
    """`auto` is a GPU when one is visible and, in a worker or actor of Ray, given to it.

    Ray hides no GPU from a process that reserved none, so several such processes would compute on the first one, unknown to Ray.
    """
    if wanted != "auto":
        return wanted
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    given = _given_gpus()
    if given is None:
        log.info("engine device: cuda (a GPU is visible)")
        return "cuda"
    if given:
        log.info("engine device: cuda (Ray has given this process GPU %s)", ", ".join(map(str, given)))
        return "cuda"
    log.warning("engine device: cpu (GPUs are visible, and this process has reserved none of Ray: set num_gpus, or engine.device)")
    return "cpu"


def _given_gpus() -> list[int | str] | None:
    """Those that Ray has assigned to this worker; None where this process is no worker of Ray's."""
    if "ray" not in sys.modules:  # who is started by Ray has imported it
        return None
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return list(ray.get_gpu_ids())


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
