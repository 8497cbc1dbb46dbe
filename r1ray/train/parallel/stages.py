"""A transformers model -> the layers of a DeepSpeed pipeline, of which this worker keeps its stage only.

    embedding | decoder layer x N | norm and head

Between stages goes one tensor, the hidden states: positions, rotary embeddings and the causal mask follow from its shape. A head that
shares its matrix with the embedding is built on both stages, and DeepSpeed adds up their gradients. What belongs to other stages is
dropped from the model, whose skeleton stays for saving. Knows no optimizer and no data.

Shapes: B rows, T positions, D hidden, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from r1ray.model.split import split_layers
from r1ray.train.loss import summed_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Stages", "build_stages"]

TIED = "embedding"


class _Embedding(nn.Module):
    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD: torch.Tensor = self.embed_tokens(ids_BT)
        return hidden_BTD


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, surroundings: _Surroundings) -> None:
        super().__init__()
        self.layer = layer
        self._surroundings = surroundings

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD: torch.Tensor = self.layer(hidden_BTD, past_key_values=None, use_cache=False, **self._surroundings.of(hidden_BTD))
        return out_BTD


class _Head(nn.Module):
    """The norm; the matrix is only multiplied where there is a label, in the loss."""

    def __init__(self, norm: nn.Module, lm_head: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        if lm_head is not None:
            self.lm_head = lm_head

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD: torch.Tensor = self.norm(hidden_BTD)
        return out_BTD


class _Surroundings:
    """What a decoder layer takes besides hidden states; the same for all layers of a pass."""

    def __init__(self, config: Any, rotary: nn.Module) -> None:
        self._config, self._rotary = config, rotary
        self._shape: Any = None
        self._made: dict[str, Any] = {}

    def of(self, hidden_BTD: torch.Tensor) -> dict[str, Any]:
        from transformers.masking_utils import create_causal_mask

        shape = (hidden_BTD.shape, hidden_BTD.dtype, hidden_BTD.device)
        if shape != self._shape:
            positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
            inputs: Any = {"inputs_embeds": hidden_BTD.detach(), "attention_mask": None, "past_key_values": None}
            mask = create_causal_mask(config=self._config, position_ids=positions_1T, **inputs)
            rotary = self._rotary.to(hidden_BTD.device)(hidden_BTD.detach(), positions_1T)
            self._made = {"attention_mask": mask, "position_ids": positions_1T, "position_embeddings": rotary}
            self._shape = shape
        return self._made


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """This worker's stage as DeepSpeed's module, and the model of which the other stages' weights were dropped."""

    module: Any
    model: PreTrainedModel
    is_tied: bool
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(hidden states, labels) of the last stage -> summed negative log-likelihood, before `loss_fn` scales it."""


def build_stages(
    model: PreTrainedModel, *, num_stages: int, stage: int, checkpointing: bool, loss_fn: Callable[[Any, Any], torch.Tensor]
) -> Stages:
    """Split `model`, whole or with a LoRA adapter, into `num_stages` of about equal size; in every worker."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = causal.model
    is_tied = causal.lm_head.weight is body.embed_tokens.weight
    ends = _ends(body, causal.lm_head, num_stages)
    first, last = ends[stage], ends[stage + 1]
    _drop(causal, body, first=first, last=last, is_tied=is_tied)
    surroundings = _Surroundings(causal.config, body.rotary_emb)
    embedding = (_Embedding, body.embed_tokens)
    specs = [TiedLayerSpec(TIED, *embedding, tied_weight_attr="embed_tokens.weight") if is_tied else LayerSpec(*embedding)]
    specs += [LayerSpec(_Layer, layer, surroundings) for layer in body.layers]
    if is_tied:
        specs += [TiedLayerSpec(TIED, *embedding, forward_fn=_unchanged, tied_weight_attr="embed_tokens.weight")]
    specs += [LayerSpec(_Head, body.norm, None if is_tied else causal.lm_head)]
    # the embedding belongs to the first layer's stage; norm, head and the embedding's second place to the last one's
    parts = [0, *(end + 1 for end in ends[1:-1]), len(specs)]

    class Pipeline(PipelineModule):
        """DeepSpeed's, cut where this module's weights were kept."""

        def _partition_layers(self, method: str = "") -> None:  # noqa: ARG002
            self.parts = parts
            self._set_bounds(start=parts[stage], stop=parts[stage + 1])

    module = Pipeline(
        specs,
        num_stages=num_stages,
        loss_fn=loss_fn,
        dynamic_shape=True,
        activation_checkpoint_interval=1 if checkpointing else 0,
        activation_checkpoint_func=_checkpoint,
    )
    for parameter in module.parameters():  # else, without ZeRO, the norm that gradients are clipped to would be the first stage's alone
        parameter.model_parallel = not parameter.ds_pipe_replicated
    matrix = body.embed_tokens if is_tied else causal.lm_head
    return Stages(module=module, model=model, is_tied=is_tied, loss=lambda hidden, labels: _summed(matrix, hidden, labels))


def _ends(body: Any, lm_head: nn.Module, num_stages: int) -> list[int]:
    """Layer numbers where stages begin, and the number of layers."""
    costs = [float(_size(layer)) for layer in body.layers]
    ranges = split_layers(costs, num_stages, before=_size(body.embed_tokens), after=_size(lm_head))
    return [first for first, _ in ranges] + [len(costs)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _drop(causal: Any, body: Any, *, first: int, last: int, is_tied: bool) -> None:
    for number, layer in enumerate(body.layers):
        if not first <= number < last:
            layer.to("meta")
    is_last = last == len(body.layers)
    if first > 0 and not (is_last and is_tied):
        body.embed_tokens.to("meta")
    if not is_last:
        body.norm.to("meta")
    if is_tied or not is_last:
        causal.lm_head.to("meta")


def _unchanged(_: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The embedding's second place: its matrix is there for the loss."""
    return hidden_BTD


def _checkpoint(function: Any, *inputs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *inputs, use_reentrant=False)


def _summed(matrix: Any, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    next_BT = labels_BT[:, 1:]
    trained_BT = next_BT != -100
    hidden_ND = hidden_BTD[:, :-1][trained_BT]
    return summed_nll(nn.functional.linear(hidden_ND, matrix.weight, getattr(matrix, "bias", None)), next_BT[trained_BT])
