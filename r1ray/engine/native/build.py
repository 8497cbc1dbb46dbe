"""Compile kernels.cpp once per source, compiler and machine; say why not where it cannot be done.

The result appears under its final name only when it is complete, so that two processes may compile at once and a killed one leaves
nothing that anybody waits for.

    python -m r1ray.engine.native.build     # compile now
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from r1ray.errors import UnsupportedModel

__all__ = ["ABI", "library", "why_not"]

log = logging.getLogger(__name__)

ABI = 3
SOURCE = Path(__file__).with_name("kernels.cpp")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-w")
TARGETS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-mfma", "-mtune=native")
TIMEOUT_S = 180.0


@cache
def why_not() -> str | None:
    """What keeps this machine from running the kernels; None when they run."""
    if os.environ.get("R1RAY_NATIVE") == "0":
        return "R1RAY_NATIVE=0 switches the compiled kernels off"
    if missing := [flag for flag in NEEDED if flag not in _cpu_flags()]:
        return f"the CPU has no {', '.join(missing)}"
    try:
        library()
    except UnsupportedModel as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels.

    Raises:
        UnsupportedModel: there is no compiler, or it fails.
    """
    file = _directory() / f"{_digest()}.so"
    if not file.exists():
        _compile(file)
    loaded = ctypes.CDLL(str(file))
    loaded.r1ray_create.restype = ctypes.c_void_p
    loaded.r1ray_create.argtypes = [ctypes.c_void_p]
    loaded.r1ray_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.r1ray_profile.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.r1ray_destroy.argtypes = [ctypes.c_void_p]
    if loaded.r1ray_abi() != ABI:
        raise UnsupportedModel(f"{file} has ABI {loaded.r1ray_abi()}, this code {ABI}. Delete it.")
    return loaded


def _directory() -> Path:
    """The user's cache on this machine, not R1RAY_HOME: that may be shared by nodes with other processors."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "r1ray" / "native"


def _compile(file: Path) -> None:
    if (compiler := _compiler()) is None:
        raise UnsupportedModel("there is no C++ compiler; install g++ (apt install g++) for three times the speed on CPUs")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedModel(f"{file.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to where it can") from error
    log.info("compiling the CPU kernels (once, some 10 s): %s", file)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".building-") as directory:
        built = Path(directory) / file.name
        command = [compiler, *FLAGS, *TARGETS, str(SOURCE), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnsupportedModel(f"compiling the CPU kernels failed: {error}") from error
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise UnsupportedModel(f"{compiler} cannot compile the CPU kernels: {first}. GCC 11 or Clang 14 can.")
        built.replace(file)


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return next((path for name in (wanted, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def _digest() -> str:
    """Source, flags and compiler: whoever changes one gets a new file."""
    machine = " ".join((*FLAGS, *TARGETS, _compiler() or "", *sorted(_cpu_flags())))
    return hashlib.sha256(SOURCE.read_bytes() + machine.encode()).hexdigest()[:16]


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


if __name__ == "__main__":
    reason = why_not()
    print(f"the CPU kernels do not run here: {reason}" if reason else "the CPU kernels are ready")
