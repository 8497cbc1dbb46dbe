"""Next-token loss that multiplies only the supervised positions by the output matrix.

Half to three quarters of a chat are questions. Their logits (49,152 per token for SmolLM2, 129,280 for R1) would cost a fifth of
the arithmetic and most of the memory, and their loss is thrown away.

Where the output matrix is frozen, as under any adapter, no pass ever holds the logits of all supervised positions: loss and gradient of
the last hidden states are made from a few of them at a time (as in Liger Kernel, arXiv 2410.10989).

Shapes: B rows, T positions, N supervised positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add_supervised_loss", "has_plain_head", "summed_nll"]

_ROWS_AT_ONCE = 32  # float32 copies of this many rows of logits stay near the cache
_ROWS_OF_MATRIX = 256  # multiplied by a frozen output matrix at a time: enough for the speed of a large product
_SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class _SummedNll(torch.autograd.Function):
    """Sum of the negative log-likelihoods; the gradient is made in the same pass and kept in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, smoothing: float) -> torch.Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = _nll_and_gradient(logits_NV, labels_N, smoothing, gradient_NV)
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(upstream), None, None


class _FrozenHeadNll(torch.autograd.Function):
    """The same of `hidden_ND @ weight_VD.T`, of a weight that is not trained; what is kept is the gradient of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, smoothing: float) -> torch.Tensor:
        is_learnt = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if is_learnt else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels_N), _ROWS_OF_MATRIX):
            rows = slice(start, start + _ROWS_OF_MATRIX)
            logits_nV = hidden_ND[rows] @ weight_VD.T
            total += _nll_and_gradient(logits_nV, labels_N[rows], smoothing, logits_nV if is_learnt else None)
            if gradient_ND is not None:
                torch.mm(logits_nV, weight_VD, out=gradient_ND[rows])
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND.mul_(upstream), None, None, None


def _nll_and_gradient(logits_NV: torch.Tensor, labels_N: torch.Tensor, smoothing: float, out: torch.Tensor | None) -> torch.Tensor:
    """Summed loss; `out`, which may be the logits themselves, takes their gradient.

    With smoothing s the label has 1 - s of the mass and all V tokens share s alike.
    """
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels_N), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        exact, labels = logits_NV[rows].float(), labels_N[rows, None]
        log_sum = exact.logsumexp(-1, keepdim=True)
        total += (log_sum - (1 - smoothing) * exact.gather(-1, labels)).sum()
        if smoothing:
            total -= smoothing * exact.mean(-1).sum()
        if out is None:
            continue
        probabilities = exact.sub_(log_sum).exp_()
        probabilities.scatter_add_(-1, labels, torch.full_like(labels, smoothing - 1, dtype=exact.dtype))
        if smoothing:
            probabilities -= smoothing / probabilities.shape[-1]
        out[rows] = probabilities
    return total


def summed_nll(logits_NV: torch.Tensor, labels_N: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over N of -log p(label), float32; zero with a gradient path when N is 0."""
    summed: torch.Tensor = _SummedNll.apply(logits_NV, labels_N, smoothing)  # type: ignore[no-untyped-call]
    return summed


def _head_nll(head: Any, hidden_ND: torch.Tensor, labels_N: torch.Tensor, smoothing: float) -> torch.Tensor:
    if not _is_frozen(head):
        return summed_nll(head(hidden_ND), labels_N, smoothing)
    summed: torch.Tensor = _FrozenHeadNll.apply(hidden_ND, head.weight, labels_N, smoothing)  # type: ignore[no-untyped-call]
    return summed


def _is_frozen(head: Any) -> bool:
    """Whether it is its weight and nothing else, all of it is here and none of it learns.

    ZeRO-3 hands a module its weight when it is called. A gradient in float16 needs the loss' scale before it is multiplied.
    """
    is_plain = type(head) is nn.Linear and getattr(head, "bias", None) is None and not hasattr(head.weight, "ds_id")
    return is_plain and not head.weight.requires_grad and head.weight.dtype != torch.float16


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output matrix times the last hidden state and nothing else."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1.0) for name in _SCALED_HEADS)


def add_supervised_loss(model: PreTrainedModel, smoothing: float = 0.0) -> None:
    """Teach `model(..., labels=labels_BT, supervised=True)` to return the summed loss; without the flag nothing changes.

    An output layer that learns or is divided is called as a module, so that ZeRO-3 gathers its weights.
    """
    usual = model.forward

    def forward(self: PreTrainedModel, *args: Any, supervised: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not supervised:
            return usual(*args, **kwargs) if labels is None else usual(*args, labels=labels, **kwargs)
        next_BT = kwargs.pop("shift_labels", None)  # of a slice of a row, whose last position has a next token too
        hidden_BTD = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        if next_BT is None:
            hidden_BTD, next_BT = hidden_BTD[:, :-1], labels[:, 1:]
        trained_BT = next_BT != -100
        return _head_nll(self.get_output_embeddings(), hidden_BTD[trained_BT], next_BT[trained_BT], smoothing if self.training else 0.0)

    model.forward = types.MethodType(forward, model)
