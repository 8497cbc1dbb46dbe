"""How well a model expects the gold answers: exp of the mean negative log likelihood of their tokens, end of turn included.

Token ids come from the training template, so reasoning counts where the gold answer has some. Earlier assistant turns are context.

Shapes: B rows, T padded tokens, K last positions, V vocabulary, A answer tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from r1ray.evaluate.shares import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Scored", "answer_start", "negative_log_likelihoods"]


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids of a whole dialogue; ids[start:] is the answer."""

    ids: list[int]
    start: int


def answer_start(mask: Sequence[int]) -> tuple[int, int]:
    """(start, end) of the last run of ones: the last assistant turn within a template's assistant mask. (0, 0) without any."""
    end = next((i + 1 for i in range(len(mask) - 1, -1, -1) if mask[i]), 0)
    start = next((i + 1 for i in range(end - 1, -1, -1) if not mask[i]), 0)
    return (start, end) if end else (0, 0)


@torch.inference_mode()
def negative_log_likelihoods(
    model: PreTrainedModel, texts: Sequence[Scored], *, batch_tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Share]:
    """(sum of negative log likelihoods, tokens) of each answer, in the order given. Batches hold texts of similar length."""
    results: dict[int, Share] = {}
    for batch in _batches(texts, batch_tokens):
        for index, nll in zip(batch, _batch_nll(model, [texts[i] for i in batch]), strict=True):
            results[index] = Share(nll, float(len(texts[index].ids) - max(texts[index].start, 1)))
        if on_done is not None:
            on_done(len(results))
    return [results[i] for i in range(len(texts))]


def _batches(texts: Sequence[Scored], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, padded size within the budget; a text longer than it goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i].ids)):
        if batch and len(texts[batch[0]].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _batch_nll(model: PreTrainedModel, texts: Sequence[Scored]) -> list[float]:
    """Rows are padded on the left: the answers end together, so logits are computed for the last positions only."""
    longest = max(len(t.ids) for t in texts)
    pads = [longest - len(t.ids) for t in texts]
    ids_BT = torch.tensor([[0] * pad + t.ids for pad, t in zip(pads, texts, strict=True)], device=model.device)
    mask_BT = torch.tensor([[0] * pad + [1] * len(t.ids) for pad, t in zip(pads, texts, strict=True)], device=model.device)
    num_kept = max(len(t.ids) - max(t.start, 1) for t in texts) + 1  # the token before an answer predicts its first one
    logits_BKV = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=num_kept,
    ).logits
    sums = []
    for row, text in enumerate(texts):
        num = len(text.ids) - max(text.start, 1)  # nothing predicts the very first token
        logits_AV = logits_BKV[row, num_kept - 1 - num : num_kept - 1].float()
        target_A = ids_BT[row, longest - num :]
        sums.append(float(torch.nn.functional.cross_entropy(logits_AV, target_A, reduction="sum")))
    return sums
