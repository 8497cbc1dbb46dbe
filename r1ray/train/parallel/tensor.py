"""Tensor parallelism (DeepSpeed AutoTP; Megatron-LM, arXiv 1909.08053), and what AutoTP cannot do for DeepSeek-V3.

AutoTP splits the linear layers that zero.py names: those before an activation or attention by columns, those after it by rows. What
it leaves whole is mended here: fused experts, each split like an MLP of its own; layers with a LoRA adapter; and the rotary key that all
heads of latent attention share, whose gradient every worker knows a part of.

The workers of a group compute the same rows. A save asks for whole tensors one by one (`whole_tensors`), through the attribute by which
AutoTP's own layers gather. Knows no optimizer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from r1ray.train.parallel.layout import COLUMNS, ROWS, Layout

__all__ = ["share_tensors", "whole_tensors"]


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


def whole_tensors(model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Every tensor of `model` by name; one that is split as what puts it together when it is asked for its `contiguous()`.

    All workers of a group ask for the same ones in the same order; only those that `keep` get them. Neither the parts nor what DeepSpeed
    knows of them change.
    """
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Any] = dict(model.state_dict())
    split = [name for name in found if getattr(parameters.get(name), "ds_is_replaced_module", False)]
    return found | {name: _Whole(parameters[name], keep) for name in split}


@dataclass(frozen=True, slots=True)
class _Whole:
    parameter: Any
    keep: bool

    def contiguous(self) -> torch.Tensor:
        """A matrix where its parts are, experts in main memory: one whole matrix is more than the parts take at any time."""
        mine = self.parameter.detach()
        if mine.dim() < 3:
            return self._gathered(mine)
        experts = torch.empty(0)
        for number, part in enumerate(mine):
            whole = self._gathered(part)
            if self.keep and not number:
                experts = torch.empty((len(mine), *whole.shape), dtype=whole.dtype)
            if self.keep:
                experts[number] = whole
        return experts

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        whole = part.detach()  # another face of the same numbers: gathering gives it new ones
        self.parameter.gather_params([whole])
        return whole


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

    def gather_fused(params: Sequence[torch.Tensor]) -> None:
        (fused,) = params  # of all experts or of one
        gates, ups = zip(*(half.chunk(2, dim=-2) for half in _gathered(fused.data, group)), strict=True)
        fused.data = torch.cat([*gates, *ups], dim=-2)

    def gather_down(params: Sequence[torch.Tensor]) -> None:
        (down,) = params
        down.data = torch.cat(_gathered(down.data, group), dim=-1)

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            usual(_Copied.apply(hidden, group), chosen, _Copied.apply(weights, group)),  # type: ignore[no-untyped-call]
            group,
        )
        return summed

    cut([experts.gate_up_proj, experts.down_proj])
    experts.forward = forward
    for parameter, gather in ((experts.gate_up_proj, gather_fused), (experts.down_proj, gather_down)):
        parameter.tensor_model_parallel = True  # what AutoTP's own layers carry: DeepSpeed's norm and `whole_tensors` look for these
        parameter.ds_is_replaced_module = True
        parameter.gather_params = gather


def _gathered(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
