"""A linear layer and its LoRA adapter computed as one: y = x W' + b + s (x A') B', and its gradients.

PEFT adds up separate products. Each makes a tensor as large as the layer's output: the adapter's part, its scaled copy, their sum, and in
the backward pass two gradients of x and theirs. Here the adapter's products are added in place and the scale goes to the narrow tensor
between A and B: 3 % of a LoRA step on a CPU (docs/training.md), and one rounding in place of three.

What PEFT's layer does beside (dropout, DoRA, split, quantised or partitioned weights, switched off or merged adapters) stays with it.
Shapes: N positions of all rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["fuse_adapters"]


def fuse_adapters(model: nn.Module) -> int:
    """Teach the layers of `model` that are plain LoRA on a plain linear layer to compute as one; how many there are.

    The weights must be whole in this process whenever the layer runs: not at ZeRO-3, whose hooks gather those of a module that is called.
    """
    from peft.tuners.lora.layer import Linear

    chosen = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for module in chosen:
        module.forward = types.MethodType(_forward(module.forward), module)
    return len(chosen)


def _is_plain(layer: Any) -> bool:
    """One adapter, whose dropout does nothing, on a frozen layer that multiplies by a matrix and does nothing else."""
    names = list(layer.lora_A)
    if len(names) != 1 or layer.lora_variant or type(layer.base_layer) is not nn.Linear:
        return False
    down, up, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    frozen = not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    are_matrices = type(down) is nn.Linear and type(up) is nn.Linear and up.bias is None
    return frozen and are_matrices and isinstance(dropout, nn.Identity)


def _forward(usual: Any) -> Any:
    def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names, base = layer.active_adapters, layer.base_layer
        is_one = len(names) == 1 and names[0] in layer.lora_A and x.dtype == base.weight.dtype == layer.lora_A[names[0]].weight.dtype
        if args or kwargs or layer.disable_adapters or layer.merged or not is_one:
            plain: torch.Tensor = usual(x, *args, **kwargs)
            return plain
        down, up, scale = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, layer.scaling[names[0]]
        result: torch.Tensor = _Adapted.apply(x, base, down, up, scale)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Adapted(torch.autograd.Function):
    """Gradients of x, A and B; the base is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: nn.Linear, down_RI: torch.Tensor, up_OR: torch.Tensor, scale: float) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = nn.functional.linear(x_NI, base.weight, base.bias)
        scaled_NR = torch.mm(x_NI, down_RI.t()).mul_(scale)
        y_NO.addmm_(scaled_NR, up_OR.t())
        ctx.save_for_backward(x_NI, base.weight, down_RI, up_OR, scaled_NR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI, down_RI, up_OR, scaled_NR = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        narrow_NR = torch.mm(gradient_NO, up_OR).mul_(ctx.scale)
        of_x = torch.mm(gradient_NO, weight_OI).addmm_(narrow_NR, down_RI).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, torch.mm(narrow_NR.t(), x_NI), torch.mm(gradient_NO.t(), scaled_NR), None
