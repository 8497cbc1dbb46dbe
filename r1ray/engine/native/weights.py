"""From a checkpoint's matrices to what the kernels read: packed panels; int8 with a scale per output, int4 with a step and a low per group.

Takes tensors by name, keeps nothing of them but the packed copy. Knows no threads and no cache.

Shapes: N outputs, K inputs of a matrix (N, K); G groups of 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1ray.engine.config import Precision
from r1ray.engine.native import structs
from r1ray.errors import UnsupportedModel

__all__ = ["KINDS", "PANEL", "Packed", "interleave", "pack"]

KINDS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int8_weight_only": 4}
PANEL = 32
HALF = PANEL // 2
DEPTH: dict[Precision, int] = {"float32": 1, "bfloat16": 2, "int8_weight_only": 2, "int8": 4, "int4": 4}  # inputs that lie together
GROUPS = (64, 32)  # activations that share an int8 scale
NIBBLES = 32  # int4 weights, and the activations they meet, that share a scale
CODES = 15  # the largest int4 code
OFFSET = 128  # int8 weights are stored unsigned; the kernels' products want one unsigned side
ROWS_AT_ONCE = 32 * PANEL  # that are rounded together: a vocabulary's floats would be the peak of a start


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
    """Round to `precision` and lay out in panels of 32 outputs, some rows at a time.

    Raises:
        UnsupportedModel: K does not divide into what the kernels multiply at once.
    """
    n, k = weight_NK.shape
    group = _group(k, precision)
    if k % DEPTH[precision]:
        raise UnsupportedModel(f"a matrix has {k} inputs; {precision} kernels need a multiple of {DEPTH[precision]}")
    weight: Tensor | None = None
    scales: list[Tensor] = []
    for first in range(0, n, ROWS_AT_ONCE):
        rows_NK = _pad_rows(weight_NK[first : first + ROWS_AT_ONCE].detach())
        if precision == "int4":
            panels = _nibbles(rows_NK.float())
        elif precision in ("int8", "int8_weight_only"):
            codes_NK, scale_N = _codes(rows_NK.float())
            scales.append(scale_N)
            stored_NK = codes_NK.add_(OFFSET).to(torch.uint8) if precision == "int8" else codes_NK.to(torch.int8)
            panels = _panels(stored_NK, DEPTH[precision])
        else:
            panels = _panels(rows_NK.to(getattr(torch, precision)), DEPTH[precision])
        if weight is None:
            weight = panels.new_empty(-(-n // PANEL), *panels.shape[1:])
        weight[first // PANEL : first // PANEL + len(panels)] = panels
    assert weight is not None, "a matrix has rows"
    bias = None if bias_N is None else _pad_rows(bias_N.detach().float()[:, None])[:, 0].contiguous()
    return Packed(n, k, precision, group, weight, torch.cat(scales) if scales else None, bias)


def _codes(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to 127 (N, K), and what one is worth in each output (N)."""
    scale_N = weight_NK.abs().amax(dim=1).clamp(min=1e-12) / 127
    return weight_NK.div(scale_N[:, None]).round_().clamp_(-127, 127), scale_N


def _nibbles(weight_NK: Tensor) -> Tensor:
    """(N / 32, G, 640) bytes: per group of 32 inputs 32 steps and 32 lows in float16, then the codes; a weight is low + step * code."""
    n, k = weight_NK.shape
    grouped_NGK = weight_NK.view(n, k // NIBBLES, NIBBLES)
    low_NG, high_NG = grouped_NGK.aminmax(dim=2)
    low_NG, step_NG = low_NG.half(), ((high_NG - low_NG) / CODES).half()
    codes_NGK = (grouped_NGK - low_NG.float()[..., None]).div_(step_NG.float().clamp(min=1e-12)[..., None]).round_().clamp_(0, CODES)
    # a byte has the code of a panel's column c in its low half and that of column c + 16 in its high half
    halves = codes_NGK.to(torch.uint8).view(n // PANEL, 2, HALF, k // NIBBLES, NIBBLES // 4, 4)
    codes = (halves[:, 0] | halves[:, 1] << 4).permute(0, 2, 3, 1, 4).flatten(2)
    ends = torch.stack([step_NG, low_NG]).view(2, n // PANEL, PANEL, -1).permute(1, 3, 0, 2).flatten(2).contiguous().view(torch.uint8)
    return torch.cat([ends, codes], dim=2)


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


def _group(k: int, precision: Precision) -> int:
    """Activations that share a scale; 0 where they are no integers."""
    if precision not in ("int8", "int4"):
        return 0
    for group in (NIBBLES,) if precision == "int4" else GROUPS:
        if k % group == 0:
            return group
    raise UnsupportedModel(f"a matrix has {k} inputs; {precision} kernels need a multiple of {GROUPS[-1]}. Set engine.dtype=bfloat16.")
