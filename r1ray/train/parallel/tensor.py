"""Tensor parallelism (DeepSpeed AutoTP; Megatron-LM, arXiv 1909.08053), and what AutoTP cannot do for DeepSeek-V3.

AutoTP splits the linear layers that zero.py names: those before an activation or attention by columns, those after it by rows. What
it leaves whole is mended here: fused experts, each split like an MLP of its own; layers with a LoRA adapter; and the rotary key that all
heads of latent attention share, whose gradient every worker knows a part of.

The workers of a group compute the same rows. Knows no optimizer; saving gathers through the same attributes as AutoTP's own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from r1ray.train.parallel.layout import COLUMNS, ROWS, Layout

__all__ = ["share_tensors"]


def share_tensors(model: nn.Module, layout: Layout) -> None:
    """Split the experts of `model` and reduce the gradients of what latent attention's heads share; in every worker, before DeepSpeed."""
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes torch's process group over
    group = _group(layout)
    for name, module in list(model.named_modules()):
        if hasattr(module, "expand_kv"):
            _reduce_rotary_key(module, group)
        if {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            _split_experts(module, group)
        if hasattr(module, "lora_A"):
            _split_adapted(name, module, group)


class _Copied(torch.autograd.Function):
    """The same to every worker, whose gradients add up."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    """The sum of the workers' parts, whose gradient is everyone's."""

    @staticmethod
    def forward(_: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        whole = part.contiguous().clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _group(layout: Layout) -> Any:
    """This worker's tensor group; all workers make all groups, as torch wants it."""
    groups = {}
    for first in range(0, layout.world, layout.tensor):
        ranks = range(first, first + layout.tensor)
        groups[first] = dist.new_group(list(ranks))
    return groups[dist.get_rank() // layout.tensor * layout.tensor]


def _reduce_rotary_key(attention: Any, group: Any) -> None:
    usual = attention.expand_kv

    def expand_kv(latent: torch.Tensor, rotary: torch.Tensor) -> Any:
        return usual(latent, _Copied.apply(rotary, group))  # type: ignore[no-untyped-call]

    attention.expand_kv = expand_kv


def _split_adapted(name: str, adapted: Any, group: Any) -> None:
    """AutoTP takes a layer with an adapter for one matrix and would drop the adapter, so its three are split here."""
    from deepspeed.module_inject import set_autotp_mode
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    leaf = name.rpartition(".")[2]
    adapted.replaced = True  # AutoTP's own mark: leave it
    set_autotp_mode(training=True)
    if leaf in COLUMNS:
        adapted.base_layer = LinearLayer(adapted.base_layer, group, name=f"{name}.base_layer")
        adapted.lora_B["default"] = LinearLayer(adapted.lora_B["default"], group, name=f"{name}.lora_B")
    elif leaf in ROWS:
        adapted.base_layer = LinearAllreduce(adapted.base_layer, group, name=f"{name}.base_layer")
        adapted.lora_A["default"] = LinearAllreduce(adapted.lora_A["default"], group, name=f"{name}.lora_A")


def _split_experts(experts: Any, group: Any) -> None:
    """Gate and up by columns, down by rows, of every expert; the router stays whole."""
    part, num = dist.get_rank(group), dist.get_world_size(group)
    usual = experts.forward

    def cut(params: Sequence[torch.Tensor]) -> None:
        fused, down = params  # E x 2I x D and E x D x I
        gate, up = fused.data.chunk(2, dim=1)
        fused.data = torch.cat([gate.chunk(num, 1)[part], up.chunk(num, 1)[part]], dim=1).contiguous()
        down.data = down.data.chunk(num, 2)[part].contiguous()

    def gather(params: Sequence[torch.Tensor]) -> None:
        fused, down = params
        gates, ups = zip(*(half.chunk(2, dim=1) for half in _gathered(fused.data, group)), strict=True)
        fused.data = torch.cat([*gates, *ups], dim=1)
        down.data = torch.cat(_gathered(down.data, group), dim=2)

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            usual(_Copied.apply(hidden, group), chosen, _Copied.apply(weights, group)),  # type: ignore[no-untyped-call]
            group,
        )
        return summed

    pair = [experts.gate_up_proj, experts.down_proj]
    cut(pair)
    experts.forward = forward
    for parameter in pair:  # what AutoTP's own layers carry: DeepSpeed's norm and its saving look for these
        parameter.tensor_model_parallel = True
        parameter.ds_is_replaced_module = True
        parameter.gather_params, parameter._tp_partition = gather, cut


def _gathered(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
