"""Log-probabilities of answers on CPUs, where TRL's fused head would multiply the questions' positions by the output matrix too.

`add_answer_logprobs(model)` goes on top of TRL's `add_fused_lm_head`: the same call gives the same `log_probs`, in less time. The
entropies and accuracies that TRL logs beside them are zero here. On GPUs TRL's own kernel skips the questions, and is left alone.

Shapes: B rows, T positions, N positions of answers, D hidden, V vocabulary.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from r1ray.train.loss import has_plain_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add_answer_logprobs", "token_logprobs"]

_ROWS_AT_ONCE = 32  # float32 copies of this many rows of logits stay near the cache


class _TokenLogprobs(torch.autograd.Function):
    """The probabilities are kept in the logits' own dtype: they are the gradient, but for a factor per row."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        probabilities_NV = torch.empty_like(logits_NV)
        logprobs_N = logits_NV.new_empty(len(labels_N), dtype=torch.float32)
        for start in range(0, len(labels_N), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            exact = logits_NV[rows].float()
            exact.sub_(exact.logsumexp(-1, keepdim=True))
            logprobs_N[rows] = exact.gather(-1, labels_N[rows, None])[:, 0]
            probabilities_NV[rows] = exact.exp_()
        ctx.save_for_backward(probabilities_NV, labels_N)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, upstream_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        probabilities_NV, labels_N = ctx.saved_tensors
        factor_N1 = upstream_N[:, None].to(probabilities_NV.dtype)
        gradient_NV = probabilities_NV * -factor_N1
        gradient_NV.scatter_add_(-1, labels_N[:, None], factor_N1)
        return gradient_NV, None


def token_logprobs(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """log p(label) of each row, float32 [N]."""
    computed: torch.Tensor = _TokenLogprobs.apply(logits_NV, labels_N)  # type: ignore[no-untyped-call]
    return computed


def add_answer_logprobs(model: PreTrainedModel) -> None:
    """Let `model(..., labels=labels_BT, fused_lm_head=True)` multiply only what is supervised by the output matrix, on CPUs.

    Nothing changes for a model whose head does more than multiply. The output layer is called as a module, so that ZeRO-3 gathers it.
    """
    if not has_plain_head(model):
        return
    fused = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or labels.device.type != "cpu":
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        hidden_BTD = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        next_BT = labels[:, 1:]
        mask_BT = next_BT != -100
        logprobs_N = token_logprobs(self.get_output_embeddings()(hidden_BTD[mask_BT]), next_BT[mask_BT])
        nothing = torch.zeros(mask_BT.shape, dtype=torch.float32)
        return FusedCausalLMOutput(
            log_probs=nothing.masked_scatter(mask_BT, logprobs_N),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=torch.zeros_like(mask_BT),
            label_mask=mask_BT,
        )

    model.forward = types.MethodType(forward, model)
