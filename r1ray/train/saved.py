"""What a rank has just saved, read again before it counts as a checkpoint: whole, every number finite, the adapter not empty.

A save that fails here never takes the place of the last good one. Knows file formats only; no trainer, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import CheckpointCorrupt

if TYPE_CHECKING:
    import torch

__all__ = ["check_saved"]

_SHARDS = ("*_optim_states.pt", "*_model_states.pt")


def check_saved(source: Path, num_trained: int) -> int:
    """Reopen the weights and DeepSpeed's shards in `source`; how many tensors there are.

    Args:
        num_trained: Tensors that are trained; the weights, where this rank wrote any, hold at least as many.

    Raises:
        CheckpointCorrupt: naming the file and the first bad tensor.
    """
    weights = sorted(source.glob("*.safetensors"))
    shards = sorted(path for pattern in _SHARDS for path in source.rglob(pattern))
    norms = {f"{file.name}: {name}": norm for file in weights for name, norm in _weights(file)}
    if weights and len(norms) < num_trained:
        raise CheckpointCorrupt(f"{source.name} holds {len(norms)} tensors where {num_trained} are trained: the save was incomplete.")
    grown = {name: norm for name, norm in norms.items() if ".lora_B" in name}
    if grown and not any(grown.values()):
        raise CheckpointCorrupt(f"{source.name}: all {len(grown)} lora_B matrices are zero, as before training: the save was empty.")
    norms |= {f"{file.name}: {name}": norm for file in shards for name, norm in _shard(file)}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise CheckpointCorrupt(
                f"{source.name}: {name} has norm {norm}: training diverged. The checkpoint before it stays; lower train.learning_rate."
            )
    return len(norms)


def _weights(file: Path) -> Iterator[tuple[str, float]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, _norm(opened.get_tensor(name))
    except SafetensorError as error:
        raise CheckpointCorrupt(f"{file.name} cannot be read again: {error}.") from error


def _shard(file: Path) -> Iterator[tuple[str, float]]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointCorrupt(f"{file.name} cannot be read again: {error}.") from error
    yield from ((name, _norm(tensor)) for name, tensor in _tensors(content, ""))


def _tensors(content: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        if content.is_floating_point():
            yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{place}.{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(value, f"{place}.{number}")


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.float().norm())
