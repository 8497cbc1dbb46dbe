"""One forward pass of a transformers causal LM for one group of streams: tokens in, a token per stream out.

Owns the model, its cache and its adapters; runs in the engine's thread only. Knows no queue and no event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from r1ray.engine.adapters import Adapters
from r1ray.engine.sampler import sample
from r1ray.engine.scheduler import Group, Move, Stream
from r1ray.engine.slots import ATTENTION, Layout, Piece, SlotCache
from r1ray.errors import UnsupportedModel

__all__ = ["ModelRunner"]

log = logging.getLogger(__name__)


class ModelRunner:
    """Model plus KV cache for `num_slots` streams."""

    def __init__(self, model: PreTrainedModel, *, num_slots: int) -> None:
        _check_supported(model)
        self.model = model.eval()
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.adapters = Adapters(model)
        self._cache = SlotCache(num_slots=num_slots, latent=getattr(model.config, "kv_lora_rank", None) is not None)

    def step(self, group: Group) -> list[tuple[Stream, int | None]]:
        """Compute the group's tokens; the next token of each stream that has one now, None where its logits are not finite."""
        self.adapters.activate(group.adapter)
        ids, sampled, streams = _packed(group)
        layout = Layout(
            rows=group.slots,
            lengths=[s.num_computed + 1 for s in group.decode],
            pieces=[Piece(s.slot, s.start, s.num) for s in group.segments],
            device=self.device,
        )
        self._cache.begin(layout)
        output = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=layout.position_N[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(sampled or [0], device=self.device),
            slots=self._cache,
        )
        for stream in group.decode:
            stream.num_computed += 1
        for segment in group.segments:
            segment.stream.num_computed += segment.num
        return list(zip(streams, sample(output.logits[0], streams), strict=True)) if streams else []

    def move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self._cache.move(move.source, move.target, move.num)

    def clear(self, slot: int) -> None:
        self._cache.clear(slot)


def _packed(group: Group) -> tuple[list[int], list[int], list[Stream]]:
    """The pass's token ids, the indices whose logits are wanted, and whose they are."""
    ids = [s.last_token for s in group.decode]
    sampled = list(range(len(ids)))
    streams = list(group.decode)
    for segment in group.segments:
        ids.extend(segment.stream.request.prompt_ids[segment.start : segment.start + segment.num])
        if segment.completes:
            sampled.append(len(ids) - 1)
            streams.append(segment.stream)
    return ids, sampled, streams


def _check_supported(model: PreTrainedModel) -> None:
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{type(model).__name__} has {sorted(unknown)} layers; the torch engine computes softmax attention only.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{type(model).__name__} does not take an attention function, as the torch engine needs. Use another one.")
