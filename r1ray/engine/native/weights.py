"""From a checkpoint's matrices to what the kernels read: packed panels, int8 with a scale per output.

Takes tensors by name, keeps nothing of them but the packed copy. Knows no threads and no cache.

Shapes: N outputs, K inputs of a matrix (N, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from r1ray.engine.native import structs
from r1ray.errors import UnsupportedModel

__all__ = ["KINDS", "PANEL", "Packed", "Precision", "interleave", "pack"]

Precision = Literal["float32", "bfloat16", "int8"]
KINDS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
PANEL = 32
HALF = PANEL // 2
DEPTH: dict[Precision, int] = {"float32": 1, "bfloat16": 2, "int8": 4}  # inputs that lie together for one output
GROUPS = (64, 32)  # activations that share an int8 scale
OFFSET = 128  # int8 weights are stored unsigned; the kernels' products want one unsigned side


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in panels. The tensors are held here, since the struct only points at them."""

    n: int
    k: int
    precision: Precision
    group: int
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def struct(self) -> structs.Linear:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (self.weight, self.scale, self.bias)]
        return structs.Linear(self.n, self.k, KINDS[self.precision], self.group, *pointers)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.bias) if t is not None)


def pack(weight_NK: Tensor, precision: Precision, bias_N: Tensor | None = None) -> Packed:
    """Round to `precision` and lay out in panels of 32 outputs.

    Raises:
        UnsupportedModel: K does not divide into what the kernels multiply at once.
    """
    n, k = weight_NK.shape
    group = _group(k) if precision == "int8" else 0
    if k % DEPTH[precision]:
        raise UnsupportedModel(f"a matrix has {k} inputs; {precision} kernels need a multiple of {DEPTH[precision]}")
    weight_NK = _pad_rows(weight_NK.detach().float() if precision != "bfloat16" else weight_NK.detach().to(torch.bfloat16))
    scale_N = None
    if precision == "int8":
        scale_N = weight_NK.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight_NK = (weight_NK / scale_N[:, None]).round_().clamp_(-127, 127).add_(OFFSET).to(torch.uint8)
    bias = None if bias_N is None else _pad_rows(bias_N.detach().float()[:, None])[:, 0].contiguous()
    return Packed(n, k, precision, group, _panels(weight_NK, DEPTH[precision]), scale_N, bias)


def interleave(gate_NK: Tensor, up_NK: Tensor) -> Tensor:
    """16 rows of gate and 16 of up in turn, so that one panel holds what one output of the MLP needs."""
    parts = [torch.unflatten(_pad_rows(tensor, HALF), 0, (-1, HALF)) for tensor in (gate_NK, up_NK)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _panels(weight_NK: Tensor, depth: int) -> Tensor:
    """(N / 32, K / depth, 32, depth)"""
    n, k = weight_NK.shape
    return weight_NK.view(n // PANEL, PANEL, k // depth, depth).transpose(1, 2).contiguous()


def _pad_rows(tensor: Tensor, multiple: int = PANEL) -> Tensor:
    missing = -tensor.shape[0] % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _group(k: int) -> int:
    for group in GROUPS:
        if k % group == 0:
            return group
    raise UnsupportedModel(f"a matrix has {k} inputs; int8 kernels need a multiple of {GROUPS[-1]}. Set engine.dtype=bfloat16.")
