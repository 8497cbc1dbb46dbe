"""What a rank has just saved, read again before it counts as a checkpoint: whole, every number finite, the adapter as it is in memory.

A save that fails here never takes the place of the last good one. Knows file formats only; no trainer, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import CheckpointCorrupt

if TYPE_CHECKING:
    import torch

__all__ = ["check_saved"]

_SHARDS = ("*_optim_states.pt", "*_model_states.pt")
_ROUNDING = 1e-3  # of a norm summed up in another order


def check_saved(source: Path, num_trained: int, held: Mapping[str, float] | None = None) -> int:
    """Reopen the weights and DeepSpeed's shards in `source`; how many tensors there are.

    Args:
        num_trained: Tensors that are trained; the weights, where this rank wrote any, hold at least as many.
        held: Name of a tensor -> norm of what this rank has of it in memory, all or a part: the file must hold at least that. An adapter
            that no step has moved yet is zero in both.

    Raises:
        CheckpointCorrupt: naming the file and the first bad tensor.
    """
    weights = sorted(source.glob("*.safetensors"))
    shards = sorted(path for pattern in _SHARDS for path in source.rglob(pattern))
    written = {name: (file.name, norm) for file in weights for name, norm in _weights(file)}
    if weights and len(written) < num_trained:
        raise CheckpointCorrupt(f"{source.name} holds {len(written)} tensors where {num_trained} are trained: the save was incomplete.")
    norms = {f"{file}: {name}": norm for name, (file, norm) in written.items()}
    norms |= {f"{file.name}: {name}": norm for file in shards for name, norm in _shard(file)}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise CheckpointCorrupt(
                f"{source.name}: {name} has norm {norm}: training diverged. The checkpoint before it stays; lower train.learning_rate."
            )
    for name, norm in (held or {}).items():
        found = written[name][1] if name in written else 0.0
        if name not in written or found < norm * (1 - _ROUNDING):
            raise CheckpointCorrupt(f"{source.name}: {name} was saved with norm {found:g}, in memory it has {norm:g}: the save was empty.")
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
