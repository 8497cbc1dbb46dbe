"""Causal attention for training on CPUs: row by row and in blocks of queries, each of which meets only the keys before its end.

transformers' eager code computes the half that the causal mask hides too, and keeps each row's probabilities twice, once in float32;
PyTorch's fused code has a slow backward pass there. This one keeps half of the probabilities, in the values' own number type: on one core
a LoRA step of SmolLM2 takes as long as eager's at 128 tokens a row, 0.87 at 512 and 0.37 at 1024 (docs/training.md).

Rows that lie end to end need no mask either: a pass hands `row_lengths` to the model where an attention mask would stand, which
transformers gives to every layer as it is. What has another mask, dropout or other keys than queries goes to transformers' sdpa.

Shapes: B rows, H heads, K key-value heads, N of all rows (B K), G heads that share one, T positions, D width of queries and keys, E of
values, n queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BLOCKWISE", "row_lengths", "set_attention"]

BLOCKWISE = "blockwise"
"""Its name among transformers' attention functions."""

_QUERIES = 128  # of a block: scores of a few heads stay near the cache

Span = tuple[int, int]
"""(first position, end) of what attends to itself and nothing else, in every row of the batch."""


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
        spans = [(0, query.shape[2])]
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return found
    out_BTHE: torch.Tensor = _Blockwise.apply(query, key, value, spans, kwargs["scaling"])  # type: ignore[no-untyped-call]
    return out_BTHE, None


def _packed(lengths: list[int]) -> list[Span]:
    ends = accumulate(lengths)
    return [(end - length, end) for length, end in zip(lengths, ends, strict=True)]


class _Blockwise(torch.autograd.Function):
    """softmax(q k' s) v of each span, and its gradients; the heads that share keys are one matrix product.

    Softmax and its gradient compute in float32 whatever number type they read and write.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTE: torch.Tensor, spans: Sequence[Span], scale: float
    ) -> torch.Tensor:
        num_rows, num_shared = k_BKTD.shape[:2]
        scaled_NGTD = (q_BHTD * scale).reshape(num_rows * num_shared, -1, *q_BHTD.shape[2:])
        k_NTD, v_NTE = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (k_BKTD, v_BKTE))
        out_BTHE = v_BKTE.new_empty(num_rows, q_BHTD.shape[2], q_BHTD.shape[1], v_BKTE.shape[3])
        out_BKGTE = _by_shared(out_BTHE, num_shared)
        hidden = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=q_BHTD.device).triu_(1)  # keys after a block's queries
        kept = []
        for keys, block in _blocks(spans):
            size = block.stop - block.start
            scores = _flat(scaled_NGTD[:, :, block]) @ k_NTD[:, keys].mT
            scores.view(len(scores), -1, size, scores.shape[2])[..., -size:].masked_fill_(hidden[:size, :size], -torch.inf)
            probabilities = scores.softmax(-1)
            part_BKGTE = out_BKGTE[:, :, :, block]
            part_BKGTE.copy_((probabilities @ v_NTE[:, keys]).view(part_BKGTE.shape))
            kept.append(probabilities)
        ctx.save_for_backward(scaled_NGTD, k_NTD, v_NTE, *kept)
        ctx.spans, ctx.scale, ctx.num_shared = spans, scale, num_shared
        return out_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled_NGTD, k_NTD, v_NTE, *kept = ctx.saved_tensors
        num_rows, num_positions, num_heads, _ = gradient_BTHE.shape
        gradient_BKGTE = _by_shared(gradient_BTHE.contiguous(), ctx.num_shared)
        of_q = scaled_NGTD.new_empty(num_rows, num_positions, num_heads, scaled_NGTD.shape[3])
        of_k, of_v = (tensor.new_empty(num_rows, num_positions, ctx.num_shared, tensor.shape[2]) for tensor in (k_NTD, v_NTE))
        of_q_BKGTD = _by_shared(of_q, ctx.num_shared)
        sums: tuple[torch.Tensor, ...] = ()
        for (keys, block), probabilities in zip(reversed(list(_blocks(ctx.spans))), reversed(kept), strict=True):
            gradient = gradient_BKGTE[:, :, :, block].reshape(len(k_NTD), -1, v_NTE.shape[2])
            of_probabilities = gradient @ v_NTE[:, keys].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            part_BKGTD = of_q_BKGTD[:, :, :, block]
            part_BKGTD.copy_((of_scores @ k_NTD[:, keys]).view(part_BKGTD.shape))
            shares = of_scores.mT @ _flat(scaled_NGTD[:, :, block]), probabilities.mT @ gradient
            if not sums:  # the last block of its span, which meets all keys
                sums = shares if block.start == keys.start else tuple(share.float() for share in shares)
            else:
                for summed, share in zip(sums, shares, strict=True):
                    summed[:, : share.shape[1]] += share
            if block.start == keys.start:
                span = slice(keys.start, keys.start + sums[0].shape[1])
                for whole, summed in zip((of_k, of_v), sums, strict=True):
                    whole[:, span] = summed.view(num_rows, ctx.num_shared, *summed.shape[1:]).transpose(1, 2)
                sums = ()
        return of_q.mul_(ctx.scale).transpose(1, 2), of_k.transpose(1, 2), of_v.transpose(1, 2), None, None


def _blocks(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """(keys, queries) of each block, in order."""
    for first, end in spans:
        for start in range(first, end, _QUERIES):
            stop = min(start + _QUERIES, end)
            yield slice(first, stop), slice(start, stop)


def _by_shared(tensor_BTHD: torch.Tensor, num_shared: int) -> torch.Tensor:
    """(B, K, G, T, D) view: the heads that share keys together."""
    num_rows, num_positions, num_heads, width = tensor_BTHD.shape
    return tensor_BTHD.view(num_rows, num_positions, num_shared, num_heads // num_shared, width).permute(0, 2, 3, 1, 4)


def _flat(block_NGnD: torch.Tensor) -> torch.Tensor:
    """(N, G n, D): a key-value head's queries below each other."""
    return block_NGnD.flatten(1, 2)
