"""Tensor parallelism inside a stage: each rank holds a part of every layer, and the ranks add up what they computed (Megatron-LM,
arXiv 1909.08053).

Attention is split by heads, MLPs and experts by their inner width: the projections into them by columns, those out of them by rows, with
one sum after each. Which layer is which says transformers' own plan of the architecture (`base_model_tp_plan`); the heads of latent
attention (DeepSeek's MLA), which that plan leaves whole, are added here. Embedding and head are split by the vocabulary. Norms, routers
and latents stay whole, and so does every hidden state: all ranks see the same ones, to the last bit.

Takes a model on the meta device and a rank; gives how each of its tensors is to be cut. Knows no checkpoint, no stages and no requests.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.errors import EngineStopped, InvalidValue, UnsupportedModel

__all__ = ["RANK_GONE", "WHOLE", "Cut", "Share", "check_split", "split"]

log = logging.getLogger(__name__)

RANK_GONE = "A tensor rank of the pipeline is gone."

SPLIT = frozenset({"colwise", "rowwise", "packed_colwise", "moe_tp_experts"})
KEPT = frozenset({"replicated_with_grad_allreduce", "mla_kv_a_proj"})
LATENT = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


class Share:
    """Rank `rank` of `size`: what it has, and the sums with the others. They join after all have loaded."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = None

    def join(self, group: Any) -> None:
        """`group`: a process group of torch.distributed with these ranks. Gloo carries what lies on a GPU through main memory."""
        self._group = group

    def sum(self, part: Tensor) -> Tensor:
        """What all ranks computed together; the same bits on each.

        Raises:
            EngineStopped: another rank is gone.
        """
        moved = self._movable(part)
        self._finish(lambda: self._group.allreduce([moved]))
        return moved.to(part.device)

    def gather(self, part: Tensor) -> Tensor:
        """All ranks' parts along the last dimension on rank 0; on the others, which need them not, their own part."""
        moved = self._movable(part)
        parts = [torch.empty_like(moved) for _ in range(self.size)] if self.rank == 0 else []
        options = torch.distributed.GatherOptions()
        options.rootRank = 0
        self._finish(lambda: self._group.gather([parts] if parts else [], [moved], options))
        return torch.cat(parts, dim=-1).to(part.device) if parts else part

    def _movable(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        return tensor.cpu() if self._group.name() == "gloo" else tensor

    def _finish(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            raise EngineStopped(RANK_GONE) from error


WHOLE = Share()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a rank's part of a tensor is taken: an even part of dimension `dim`, counted from the last.

    `packed`: the dimension holds two matrices, one behind the other (gate and up), and the part has some of each. `once`: the bias of a
    layer whose results are added up, so only rank 0 has it.
    """

    dim: int = -1
    packed: bool = False
    once: bool = False

    def __call__(self, tensor: Tensor, share: Share) -> Tensor:
        if self.once:
            return tensor if share.rank == 0 else torch.zeros_like(tensor)
        parts = []
        for matrix in tensor.chunk(2, self.dim) if self.packed else (tensor,):
            width, rest = divmod(matrix.shape[self.dim], share.size)
            if rest:
                raise UnsupportedModel(f"A tensor of shape {list(tensor.shape)} cannot be cut into {share.size} even parts.")
            parts.append(matrix.narrow(self.dim, share.rank * width, width))
        return torch.cat(parts, self.dim) if self.packed else parts[0]


def check_split(config: Any, size: int) -> None:
    """Can this architecture be split so often? From its configuration alone, before anything is loaded.

    Raises:
        InvalidValue: `size` does not divide its heads or widths.
        UnsupportedModel: transformers has no plan for it, or one that this engine cannot follow.
    """
    config = config.get_text_config()
    _plan(config)
    latent = getattr(config, "kv_lora_rank", None) is not None
    numbers = {key: getattr(config, key, None) for key in SIZES if not (latent and key == "num_key_value_heads")}
    found = {key: number for key, number in numbers.items() if number}
    wrong = [f"{key}={number}" for key, number in found.items() if number % size]
    if wrong:
        common = math.gcd(*found.values())
        fitting = ", ".join(str(degree) for degree in range(1, common + 1) if common % degree == 0)
        raise InvalidValue(
            f"engine.tensor_parallel={size} does not divide this model's {', '.join(wrong)}. Set one of {fitting}, "
            "and engine.stages for more processes."
        )


def split(model: Any, share: Share) -> Mapping[str, Cut]:
    """Shrink what is split in `model`, still without weights, to this rank's part, and put the sums behind it.

    Returns how each shrunk tensor is cut out of the checkpoint's, by its name.
    """
    if share.size == 1:
        return {}
    cuts = _cut_layers(model, share) | _cut_vocabulary(model, share)
    for name, cut in cuts.items():
        module, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(module)._parameters
        parameters[leaf] = nn.Parameter(cut(parameters[leaf].detach(), share), requires_grad=False)
    return cuts


def _plan(config: Any) -> Mapping[str, str]:
    """Module or parameter below the model's body, layer numbers as `*` -> how it is split."""
    plan = dict(config.base_model_tp_plan or {})
    if getattr(config, "kv_lora_rank", None) is not None:
        plan |= LATENT
    plan = {name: style for name, style in plan.items() if style not in KEPT}
    if not plan or (strange := sorted(set(plan.values()) - SPLIT)):
        why = f"a plan with {', '.join(strange)}" if plan else "no plan"
        raise UnsupportedModel(
            f"Models of type {config.model_type} cannot be split inside their layers: transformers has {why} for them. "
            "Set engine.tensor_parallel=1 and split by layers with engine.stages, or use engine.type=vllm."
        )
    return plan


def _cut_layers(model: Any, share: Share) -> dict[str, Cut]:
    plan = _plan(model.config.get_text_config())
    cuts: dict[str, Cut] = {}
    partial: list[str] = []
    for name, module in model.model.named_modules():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        style = plan.get(pattern)
        if style in ("rowwise", "moe_tp_experts"):
            partial.append(name)
        for leaf, _ in module.named_parameters(recurse=False):
            if (cut := _cut(plan.get(f"{pattern}.{leaf}", style), is_bias=leaf == "bias")) is not None:
                cuts[f"model.{name}.{leaf}"] = cut
    for name in _summed_together(partial):
        model.model.get_submodule(name).register_forward_hook(lambda _module, _inputs, part: share.sum(part))
    return cuts


def _cut(style: str | None, *, is_bias: bool) -> Cut | None:
    if style == "colwise":
        return Cut(dim=-1 if is_bias else -2)
    if style == "rowwise":
        return Cut(once=True) if is_bias else Cut()
    return Cut(dim=-2, packed=True) if style == "packed_colwise" else None


def _summed_together(names: list[str]) -> set[str]:
    """Routed and shared experts of a layer are added to each other, so one sum behind both is enough."""
    found = set(names)
    for routed in [name for name in names if name.endswith(".experts")]:
        layer = routed.removesuffix(".experts")
        if (shared := f"{layer}.shared_experts.down_proj") in found:
            found = found - {routed, shared} | {layer}
    return found


def _cut_vocabulary(model: Any, share: Share) -> dict[str, Cut]:
    vocabulary = model.config.get_text_config().vocab_size
    if vocabulary % share.size:
        log.info("tensor parallel: embedding and head stay whole (%d tokens do not divide by %d)", vocabulary, share.size)
        return {}
    cuts = {}
    if isinstance(model.model.embed_tokens, nn.Embedding):
        cuts["model.embed_tokens.weight"] = Cut(dim=-2)
        _look_up_together(model.model.embed_tokens, share)
    if isinstance(model.lm_head, nn.Linear):
        cuts |= {f"lm_head.{leaf}": Cut(dim=-1 if leaf == "bias" else -2) for leaf, _ in model.lm_head.named_parameters()}
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: share.gather(logits))
    return cuts


def _look_up_together(embedding: Any, share: Share) -> None:
    """Each rank gives the rows it has and zeros for the others: their sum is exact."""
    usual: Callable[[Tensor], Tensor] = embedding.forward
    embedding.padding_idx = None  # of no use without gradients, and outside most parts

    def forward(ids: Tensor) -> Tensor:
        num = embedding.weight.shape[0]
        own = ids - share.rank * num
        elsewhere = (own < 0) | (own >= num)
        return share.sum(usual(own.clamp(0, num - 1)).masked_fill(elsewhere[..., None], 0.0))

    embedding.forward = forward
