"""Whether the installed torch can use this machine's NVIDIA GPUs: its CUDA against the driver, its kernels against the GPUs.

    torch 2.13.0 wants CUDA 13.0 and so an NVIDIA driver of at least 580; this machine has 535.104.05. Update the driver, ...

Takes version numbers, gives a sentence; looks the numbers up where they lie. torch is imported only where there is a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Gpus", "Installed", "complaint", "find_gpus", "installed_torch"]

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Of a major version of CUDA; newer minor versions run on it too (NVIDIA, CUDA Compatibility, minor version compatibility)."""
_PROC = Path("/proc/driver/nvidia/version")
_VERSION = re.compile(r"\b(\d{3})\.(\d+)(?:\.\d+)*\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What the driver says. `lines` are for people; `capabilities` one (major, minor) per GPU, empty where it does not tell."""

    driver: str | None
    lines: Sequence[str] = ()
    capabilities: Sequence[tuple[int, int]] = ()
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Of torch: its version, the CUDA that it was built for (None: CPUs), the kernels in it (`sm_90`, `compute_120`, ...)."""

    version: str
    cuda: str | None
    kernels: Sequence[str] = ()


def complaint(gpus: Gpus, torch: Installed) -> str | None:
    """What keeps torch from these GPUs and what to do; None when nothing does."""
    if torch.cuda is None:
        return f"torch {torch.version} was built for CPUs. Install its CUDA build: scripts/setup."
    least = LEAST_DRIVER.get(int(torch.cuda.split(".")[0]))
    if gpus.driver is not None and least is not None and int(gpus.driver.split(".")[0]) < least:
        return (
            f"torch {torch.version} wants CUDA {torch.cuda} and so an NVIDIA driver of at least {least}; this machine has {gpus.driver}. "
            "Update the driver, or install a torch for an older CUDA; until then train and serve on CPUs."
        )
    lacking = [each for each in gpus.capabilities if torch.kernels and not any(_runs(kernel, each) for kernel in torch.kernels)]
    if lacking:
        major, minor = lacking[0]
        return (
            f"torch {torch.version} has no kernels for compute capability {major}.{minor}, only {', '.join(torch.kernels)}. "
            "Install a torch that has them, or leave this GPU out with CUDA_VISIBLE_DEVICES."
        )
    return None


def find_gpus() -> Gpus | None:
    """None where there is no NVIDIA driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Gpus(driver=_driver_of(_PROC.read_text(encoding="utf-8"))) if _PROC.is_file() else None
    try:
        lines = _ask(command, "name,memory.total,driver_version")
    except (OSError, subprocess.SubprocessError) as error:
        driver = _driver_of(_PROC.read_text(encoding="utf-8")) if _PROC.is_file() else None
        return Gpus(driver=driver, trouble=f"nvidia-smi fails: {error}. Mend the driver, or train on CPUs.")
    try:
        told = _ask(command, "compute_cap")
    except (OSError, subprocess.SubprocessError):  # drivers before 510 do not know the question
        told = []
    capabilities = [(int(match[1]), int(match[2])) for line in told if (match := re.fullmatch(r"(\d+)\.(\d+)", line))]
    return Gpus(driver=lines[0].rpartition(",")[2].strip() if lines else None, lines=lines, capabilities=capabilities)


def installed_torch() -> Installed | None:
    """Without importing it where it was built for CPUs; None where it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    said = _constants(Path(spec.origin).with_name("version.py"))
    version, cuda = said.get("__version__"), said.get("cuda")
    return Installed(version=str(version), cuda=cuda, kernels=_kernels() if cuda else ())


def _kernels() -> Sequence[str]:
    import torch

    return torch.cuda.get_arch_list()  # empty where the driver is too old to start CUDA


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor one on; `compute_*` is translated for whatever is newer."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", kernel)
    if match is None:
        return False
    built = (int(match[2]), int(match[3]))
    if match[4]:
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def _ask(command: str, fields: str) -> list[str]:
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    return [line.strip() for line in done.stdout.strip().splitlines()]


def _driver_of(text: str) -> str | None:
    """`NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ...` -> 535.104.05"""
    found = _VERSION.search(text)
    return found[0] if found else None


def _constants(file: Path) -> dict[str, str | None]:
    """What a version.py assigns, read and not run."""
    constants: dict[str, str | None] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, str)):
            constants |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    return constants
