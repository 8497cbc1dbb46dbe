"""What the forward pass keeps for the backward pass: bytes per token, tensor by tensor as transformers' layers save them.

Letters: D hidden, H heads, T the padded length, I the feed-forward width, `e` bytes per number. A soft prompt's embeddings lengthen every
row, a prefix what every position attends to. The softmax and the norms work in
float32 whatever the weights are. Knows no GPUs and no ZeRO: activations are never split by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from r1ray.model.plan.adapter import Adapter
from r1ray.model.plan.shape import ModelShape

__all__ = ["Activations", "Attention", "Batch", "activations_of"]

Attention = Literal["eager", "sdpa", "blockwise"]
_BLOCK = 128
"""Queries that blockwise attention (r1ray/train/attention.py) computes at once."""
_ROWS_OF_MATRIX = 256
"""Positions whose logits the loss under a frozen output layer (r1ray/train/loss.py) has at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass of one worker: `size` dialogues padded to `length`; `num_supervised` positions carry loss."""

    size: int
    length: int
    num_supervised: int
    whole_logits: bool = True
    """Whether the loss has the logits of all of them at once: not under a frozen output layer (r1ray/train/loss.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes on one worker. `kept` lasts through the forward pass, `working` is one layer's temporary, `logits` the output layer's."""

    kept: float
    working: float
    logits: float

    @property
    def peak(self) -> float:
        """The output layer is computed when everything is kept; a layer's backward pass afterwards."""
        return self.kept + max(self.working, self.logits)


def activations_of(
    shape: ModelShape,
    batch: Batch,
    *,
    adapter: Adapter | None,
    attention: Attention,
    checkpointing: bool,
    bytes_per_value: float = 2,
) -> Activations:
    """For training all weights (`adapter` None) or an adapter."""
    size = bytes_per_value
    moe, dense = shape.num_moe_layers, shape.num_layers - shape.num_moe_layers
    length = batch.length + (adapter.num_embedded if adapter else 0)
    seen = length + (adapter.num_cached if adapter else 0)
    attended = _attention(shape, length, seen, adapter, attention, size)
    per_dense = attended + _dense(shape, adapter, size)
    per_moe = attended + _experts(shape, adapter, size) if moe else 0.0
    layers = dense * per_dense + moe * per_moe
    if adapter is not None and adapter.num_cached:
        layers -= _unmoved(shape, length, seen, attention, size)
    widest = max(per_dense if dense else 0.0, per_moe)
    working = _temporary(shape, seen, attention, size)
    if checkpointing:
        layers, working = shape.num_layers * shape.hidden * size, working + widest
    if batch.whole_logits:
        logits = 2 * size * shape.vocab * batch.num_supervised  # and their gradient
    else:
        logits = size * (shape.vocab * min(batch.num_supervised, _ROWS_OF_MATRIX) + shape.hidden * batch.num_supervised)
    final_norm = _norm(shape.hidden, adapter, size, feeds_trained=adapter is None)
    num_tokens = batch.size * length
    return Activations(kept=(layers + final_norm) * num_tokens, working=working * num_tokens, logits=logits)


def _norm(width: int, adapter: Adapter | None, size: float, *, feeds_trained: bool) -> float:
    """Its float32 input; where the norm is trained the normalised value; the output where a trained layer multiplies it."""
    scaled = size if adapter is None else 0.0
    return width * (4 + scaled + (size if feeds_trained else 0.0))


def _attention(shape: ModelShape, length: int, seen: int, adapter: Adapter | None, attention: Attention, size: float) -> float:
    """Per position of `length`, each of which attends to `seen`."""
    queries, values = shape.num_heads * shape.key_dim, shape.num_heads * shape.value_dim
    feeds_trained = adapter is None or adapter.num_targets > 0
    kept = _norm(shape.hidden, adapter, size, feeds_trained=feeds_trained)
    if shape.latent is not None:
        ranks = shape.latent.kv_rank + (shape.latent.query_rank or 0)
        kept += _norm(ranks, adapter, size, feeds_trained=feeds_trained)
    if shape.query_key_norm:
        kept += _norm(queries + shape.num_kv_heads * shape.key_dim, adapter, size, feeds_trained=False)
    if adapter is not None:
        kept += adapter.num_targets * adapter.rank * size
    if attention == "eager":  # keys and values repeated for every head, probabilities in float32 and as multiplied
        keys = (queries + values) * seen / length
        output = values if feeds_trained else 0  # what o_proj multiplies
        return kept + size * (queries + keys + output) + shape.num_heads * seen * (4 + size)
    if attention == "blockwise":  # each block's probabilities as multiplied; keys and values of the heads that there are
        keys = (shape.num_heads if shape.latent is not None else shape.num_kv_heads) * (shape.key_dim + shape.value_dim)
        output = values if feeds_trained else 0
        return kept + size * (queries + keys + output + shape.num_heads * _met(length))
    is_cached = adapter is not None and adapter.num_cached > 0
    shared = shape.num_heads if shape.latent is not None or is_cached else shape.num_kv_heads
    keys = shared * (shape.key_dim + shape.value_dim) * seen / length
    mask = seen if is_cached else 0  # what is cached takes a mask, which every layer converts, and keys and values of every head
    return kept + size * (queries + keys + values + mask) + 4 * shape.num_heads


def _met(length: int) -> float:
    """Keys that a position meets on average, where a block meets all keys before its end."""
    return sum(min(position - position % _BLOCK + _BLOCK, length) for position in range(length)) / length


def _unmoved(shape: ModelShape, length: int, seen: int, attention: Attention, size: float) -> float:
    """What the first layer does not keep where only cached keys and values are trained: nothing before them wants a gradient."""
    queries, keys = shape.num_heads * shape.key_dim, shape.num_kv_heads * shape.key_dim
    norms = 4 * (shape.hidden + (queries + keys if shape.query_key_norm else 0))
    return norms + (size * queries * seen / length if attention == "eager" else 0.0)


def _dense(shape: ModelShape, adapter: Adapter | None, size: float) -> float:
    trained = adapter is None or adapter.adapts_mlp
    kept = shape.intermediate * size * (4 if trained else 3)  # gate, its silu, up; the product where down_proj is trained
    return _norm(shape.hidden, adapter, size, feeds_trained=trained) + kept


def _experts(shape: ModelShape, adapter: Adapter | None, size: float) -> float:
    """Each token's copies for its experts, and the shared ones; the router computes in float32."""
    trained = adapter is None
    copies = shape.experts_per_token
    inside = (copies + shape.num_shared_experts) * shape.expert_intermediate * size * (4 if trained else 3)
    moved = copies * shape.hidden * size * (2 if trained else 1)  # gathered inputs and weighted outputs
    router = 4 * (shape.hidden + 2 * shape.num_experts) if trained else 8 * shape.num_experts
    return _norm(shape.hidden, adapter, size, feeds_trained=trained) + inside + moved + router


def _temporary(shape: ModelShape, seen: int, attention: Attention, size: float) -> float:
    """Of one layer's backward pass: gradients of the scores, of the feed-forward block and of the residual stream."""
    scores = shape.num_heads * seen * (8 + 2 * size) if attention == "eager" else 0.0
    width = max(shape.intermediate, shape.expert_intermediate * max(1, shape.experts_per_token))
    return scores + size * (3 * width + 4 * shape.hidden)
