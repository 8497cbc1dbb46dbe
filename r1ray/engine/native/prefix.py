"""Given keys and values -> the blocks of the kernels' cache, in the order that `store_f32` and `store_bf16` write them.

Shapes: K key heads, P positions (whole blocks), D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.native.weights import PANEL

__all__ = ["write_blocks"]


def write_blocks(keys: Tensor, values: Tensor, blocks: Sequence[int], key_KPD: Tensor, value_KPD: Tensor) -> None:
    """Into one layer's cache tensors (blocks, K, D * BLOCK_SIZE)."""
    heads, _, size = key_KPD.shape
    for number, block in enumerate(blocks):
        rows = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        key, value = key_KPD[:, rows].to(keys.dtype), value_KPD[:, rows].to(values.dtype)
        panels = value.view(heads, BLOCK_SIZE, size // PANEL, PANEL)
        if keys.dtype == torch.float32:
            stored = key.transpose(1, 2), panels.transpose(1, 2)
        else:  # pairs of numbers lie together: of a key's own numbers, of neighbouring positions' values
            stored = (
                key.view(heads, BLOCK_SIZE, size // 2, 2).transpose(1, 2),
                panels.view(heads, BLOCK_SIZE // 2, 2, size // PANEL, PANEL).permute(0, 3, 1, 4, 2),
            )
        keys[block], values[block] = (part.reshape(heads, -1) for part in stored)
