"""The distance of a student's next-token probabilities to a teacher's, summed over the supervised positions.

With p the teacher's and q the student's softmax(logits / T):

    forward   KL(p, q) = sum p (log p - log q)              the student covers all that the teacher says
    reverse   KL(q, p) = sum q (log q - log p)              the student says only what the teacher says
    jsd       KL(p, m) / 2 + KL(q, m) / 2, m = (p + q) / 2  between the two

Each is multiplied by T squared, so that its gradient does not fade with a higher temperature (arXiv 1503.02531).

Shapes: B rows, T positions, N supervised positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from r1ray.train.loss import summed_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from r1ray.train.blocks import DistillSettings

__all__ = ["Divergence", "add_distillation_loss", "summed_divergence", "supervised_logits"]

Divergence = Literal["forward", "reverse", "jsd"]

_ROWS_AT_ONCE = 32  # float32 copies of this many rows of logits stay near the cache


class _Divergence(torch.autograd.Function):
    """Value and gradient in one pass over the logits; the gradient is kept in the student's own dtype."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, kind: Divergence, temperature: float) -> Tensor:
        gradient_NV = torch.empty_like(student_NV)
        total = student_NV.new_zeros((), dtype=torch.float32)
        for start in range(0, len(student_NV), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            log_q, log_p = ((logits[rows].float() / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
            value_N, slope = _value_and_slope(log_q, log_p, kind)
            total += value_N.sum()
            gradient_NV[rows] = slope * temperature  # T * T of the loss, 1 / T of the softmax
        ctx.save_for_backward(gradient_NV)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * upstream.to(gradient_NV.dtype), None, None, None


def summed_divergence(student_NV: Tensor, teacher_NV: Tensor, kind: Divergence, temperature: float) -> Tensor:
    """Sum over N, float32; zero with a gradient path when N is 0. A larger vocabulary's further entries are padding and count nothing."""
    width = min(student_NV.shape[-1], teacher_NV.shape[-1])
    summed: Tensor = _Divergence.apply(student_NV[:, :width], teacher_NV[:, :width], kind, temperature)  # type: ignore[no-untyped-call]
    return summed


def supervised_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """(N, V): what `model` says at the positions whose next token is a label; without gradients."""
    labels_BT = inputs["labels"][:, 1:]
    known = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        hidden_BTD = model.base_model(**known, use_cache=False).last_hidden_state[:, :-1]
        logits_NV: Tensor = model.get_output_embeddings()(hidden_BTD[labels_BT != -100])
    return logits_NV


def add_distillation_loss(model: PreTrainedModel, settings: DistillSettings) -> None:
    """Teach `model(..., labels=labels_BT, taught=teacher_NV)` to return alpha x divergence + (1 - alpha) x next-token loss, summed.

    Without `taught` nothing changes. The output layer is called as a module, so that ZeRO gathers its weights.
    """
    usual = model.forward

    def forward(self: PreTrainedModel, *args: Any, taught: Tensor | None = None, labels: Any = None, **kwargs: Any) -> Any:
        if taught is None:
            return usual(*args, **kwargs) if labels is None else usual(*args, labels=labels, **kwargs)
        hidden_BTD = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        next_BT = labels[:, 1:]
        trained_BT = next_BT != -100
        logits_NV = self.get_output_embeddings()(hidden_BTD[trained_BT])
        loss = settings.alpha * summed_divergence(logits_NV, taught, settings.divergence, settings.temperature)
        if settings.alpha < 1:
            loss = loss + (1 - settings.alpha) * summed_nll(logits_NV, next_BT[trained_BT])
        return loss

    model.forward = types.MethodType(forward, model)


def _value_and_slope(log_q: Tensor, log_p: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """(N,) divergences and their derivative by the student's softmax inputs."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == "reverse":
        ratio = log_q - log_p
        value_N = (q * ratio).sum(-1)
        return value_N, q * (ratio - value_N[:, None])
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    ratio = log_q - log_m
    to_student_N = (q * ratio).sum(-1)
    return ((p * (log_p - log_m)).sum(-1) + to_student_N) / 2, q * (ratio - to_student_N[:, None]) / 2
