"""FP8 checkpoints, as DeepSeek publishes V3 and R1: float8 weights and, beside each, the factors that give its numbers back.

`NAME.weight` has `NAME.weight_scale_inv`: one float32 factor for each block of 128 x 128 numbers (blocks at the edges are smaller), or
one for the whole tensor. Takes what config.json says and tensors by their names; gives the same tensors in bfloat16, the numbers of
DeepSeek's own conversion to the bit. Every other way of quantising is refused: read as plain numbers it would answer in garbage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from r1ray.model.checkpoint import Tensors

__all__ = ["SCALE", "Fp8", "dequantize", "dequantized", "fp8_of"]

SCALE = "_scale_inv"  # of a weight's name, for its factors
INSTEAD = "Give the model's weights in bfloat16, or serve it with engine.type=vllm, which reads such weights itself."


@dataclass(frozen=True, slots=True)
class Fp8:
    """How many rows and columns share a factor."""

    block: tuple[int, int] = (128, 128)


def fp8_of(config: Mapping[str, Any], directory: Path) -> Fp8 | None:
    """What the config.json of `directory` says of its weights; None: they are plain numbers.

    Raises:
        UnsupportedModel: they are quantised in another way.
    """
    stored = config.get("quantization_config") or config.get("compression_config")
    if not stored:
        return None
    method = stored.get("quant_method")
    if method != "fp8" or stored.get("expert_dtype", "fp8") != "fp8":
        how = f"{method} with {stored['expert_dtype']} experts" if method == "fp8" else str(method)
        raise UnsupportedModel(f"{directory} holds weights quantised with {how}; r1ray reads fp8 with factors per block. {INSTEAD}")
    rows, columns = stored.get("weight_block_size") or (128, 128)
    return Fp8((int(rows), int(columns)))


def dequantized(tensors: Tensors, fp8: Fp8 | None = None) -> Tensors:
    """`tensors` with every float8 weight as bfloat16; others as they are. Costs what is asked for: one tensor at a time.

    Raises:
        UnsupportedModel: later, a float8 tensor without factors, or with other ones than its blocks need.
    """
    form = fp8 or Fp8()

    def tensor(name: str) -> Tensor | None:
        found = tensors(name)
        if found is None or not str(found.dtype).startswith("torch.float8") or name.endswith(SCALE):
            return found
        if (factors := tensors(name + SCALE)) is None:
            raise UnsupportedModel(f"{name} is {found.dtype} and the checkpoint has no {name + SCALE} to read it with. {INSTEAD}")
        try:
            return dequantize(found, factors, form)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name}: {error}") from error

    return tensor


def dequantize(weight: Tensor, factors: Tensor, fp8: Fp8) -> Tensor:
    """(..., rows, columns) float8 times (..., blocks down, blocks across) factors, or a single one -> bfloat16; multiplied in float32.

    Raises:
        UnsupportedModel: as many factors as the blocks do not need, or factors that are no floating point numbers.
    """
    import torch

    if not factors.dtype.is_floating_point:
        raise UnsupportedModel(f"its factors are stored as {factors.dtype}, not as floating point numbers. {INSTEAD}")
    if factors.numel() == 1:
        return (weight.float() * factors.float().reshape(())).to(torch.bfloat16)
    rows, columns = fp8.block
    wanted = (*weight.shape[:-2], -(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns)) if weight.dim() > 1 else (1,)
    if tuple(factors.shape) != wanted:
        raise UnsupportedModel(
            f"factors of shape {list(factors.shape)} for a weight of {list(weight.shape)} in blocks of {rows} x {columns}, "
            f"which need {list(wanted)}. {INSTEAD}"
        )
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    across = factors.float().repeat_interleave(columns, dim=-1)[..., : weight.shape[-1]]
    for number in range(wanted[-2]):  # a row of blocks at a time: a float32 copy of a whole weight would be four times its size
        part = slice(number * rows, (number + 1) * rows)
        result[..., part, :] = (weight[..., part, :].float() * across[..., number : number + 1, :]).to(torch.bfloat16)
    return result
