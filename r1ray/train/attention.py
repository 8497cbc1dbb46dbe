"""Causal attention for training on CPUs: row by row and in blocks of queries, each of which meets only the keys before its end.

transformers' eager code computes the half that the causal mask hides too, and keeps each row's probabilities twice, once in float32;
PyTorch's fused code has a slow backward pass there. This one keeps half of the probabilities, in the values' own number type: on one core
a step of SmolLM2 takes 0.8 of the time at 110 tokens a row and 0.2 at 1000 (docs/training.md).

Rows that lie end to end need no mask either: a pass hands `row_lengths` to the model where an attention mask would stand, which
transformers gives to every layer as it is. What has another mask, dropout or other keys than queries goes to transformers' sdpa.

Shapes: B rows, H heads, K key-value heads, T positions, D width of queries and keys, E of values; n queries of a block, m keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BLOCKWISE", "row_lengths", "set_attention"]

BLOCKWISE = "blockwise"
"""Its name among transformers' attention functions."""

_QUERIES = 128  # of a block: scores of a few heads stay near the cache

Span = tuple[int, int, int]
"""(row of the batch, first position, end) of what attends to itself and nothing else."""


def set_attention(model: PreTrainedModel, name: str) -> None:
    """`blockwise`, or an attention function that transformers has."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(BLOCKWISE, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKWISE, sdpa_mask)  # None where the mask is the causal one
    model.set_attn_implementation(name)


def row_lengths(lengths: Sequence[int]) -> torch.Tensor:
    """(1, 1, 1, rows) integers: stands for the attention mask of a pass of one row in which several lie end to end."""
    return torch.tensor(lengths)[None, None, None]


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (B, T, H, E) and no weights."""
    if mask is not None and mask.dtype == torch.int64:
        spans = _packed(mask[0, 0, 0].tolist())
    elif mask is None and query.shape[2] == key.shape[2] > 1 and not kwargs.get("dropout"):
        spans = [(row, 0, query.shape[2]) for row in range(len(query))]
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return found
    out_BTHE: torch.Tensor = _Blockwise.apply(query, key, value, spans, kwargs["scaling"])  # type: ignore[no-untyped-call]
    return out_BTHE, None


def _packed(lengths: list[int]) -> list[Span]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(0, end - length, end) for length, end in zip(lengths, ends, strict=True)]


class _Blockwise(torch.autograd.Function):
    """softmax(q k' s) v of each span, and its gradients; the heads that share keys are one matrix product.

    Softmax and its gradient compute in float32 whatever number type they read and write.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTE: torch.Tensor, spans: Sequence[Span], scale: float
    ) -> torch.Tensor:
        scaled_BKGTD = _grouped(q_BHTD * scale, k_BKTD)
        out_BTHE = _like_positions(q_BHTD, v_BKTE.shape[-1])
        out_BKGTE = _grouped(out_BTHE.transpose(1, 2), k_BKTD)
        hidden = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=q_BHTD.device).triu_(1)  # keys after a block's queries
        kept = []
        for row, keys, block in _blocks(spans):
            size = block.stop - block.start
            scores = _flat(scaled_BKGTD[row, :, :, block]) @ k_BKTD[row, :, keys].mT
            _by_query(scores, size)[..., -size:].masked_fill_(hidden[:size, :size], -torch.inf)
            probabilities = scores.softmax(-1)
            out_BKGTE[row, :, :, block] = _by_query(probabilities @ v_BKTE[row, :, keys], size)
            kept.append(probabilities)
        ctx.save_for_backward(scaled_BKGTD, k_BKTD, v_BKTE, *kept)
        ctx.spans, ctx.scale = spans, scale
        return out_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled_BKGTD, k_BKTD, v_BKTE, *kept = ctx.saved_tensors
        gradient_BKGTE = _grouped(gradient_BTHE.transpose(1, 2), k_BKTD)
        of_q, of_k, of_v = _like_positions(scaled_BKGTD.flatten(1, 2)), _like_positions(k_BKTD), _like_positions(v_BKTE)
        of_q_BKGTD = _grouped(of_q.transpose(1, 2), k_BKTD)
        sums: tuple[torch.Tensor, ...] = ()
        for (row, keys, block), probabilities in zip(reversed(list(_blocks(ctx.spans))), reversed(kept), strict=True):
            gradient = _flat(gradient_BKGTE[row, :, :, block])
            of_probabilities = gradient @ v_BKTE[row, :, keys].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            of_q_BKGTD[row, :, :, block] = _by_query(of_scores @ k_BKTD[row, :, keys], block.stop - block.start)
            shares = of_scores.mT @ _flat(scaled_BKGTD[row, :, :, block]), probabilities.mT @ gradient
            if not sums:  # the last block of its span, which meets all keys
                sums = shares if block.start == keys.start else tuple(share.float() for share in shares)
            else:
                for summed, share in zip(sums, shares, strict=True):
                    summed[:, : share.shape[1]] += share
            if block.start == keys.start:
                span = slice(keys.start, keys.start + sums[0].shape[1])
                of_k[row, span], of_v[row, span] = (summed.transpose(0, 1) for summed in sums)
                sums = ()
        return of_q.mul_(ctx.scale).transpose(1, 2), of_k.transpose(1, 2), of_v.transpose(1, 2), None, None


def _blocks(spans: Sequence[Span]) -> Iterator[tuple[int, slice, slice]]:
    """(row, keys, queries) of each block, in order."""
    for row, first, end in spans:
        for start in range(first, end, _QUERIES):
            stop = min(start + _QUERIES, end)
            yield row, slice(first, stop), slice(start, stop)


def _grouped(tensor_BHTD: torch.Tensor, k_BKTD: torch.Tensor) -> torch.Tensor:
    """(B, K, G, T, D): the G heads that share a key-value head together."""
    grouped: torch.Tensor = tensor_BHTD.unflatten(1, (k_BKTD.shape[1], -1))  # type: ignore[no-untyped-call]
    return grouped


def _flat(block_KGnD: torch.Tensor) -> torch.Tensor:
    """(K, G n, D): a key-value head's queries below each other."""
    return block_KGnD.flatten(1, 2)


def _by_query(flat: torch.Tensor, num_queries: int) -> torch.Tensor:
    """(K, G, n, ...) of (K, G n, ...)."""
    apart: torch.Tensor = flat.unflatten(1, (-1, num_queries))  # type: ignore[no-untyped-call]
    return apart


def _like_positions(tensor_BHTD: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """(B, T, H, D), uninitialised: positions first, as the layers before and after hold them."""
    num_rows, num_heads, num_positions, own = tensor_BHTD.shape
    return tensor_BHTD.new_empty(num_rows, num_positions, num_heads, width or own)
