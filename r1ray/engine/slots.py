"""The slotted KV cache and the attention that reads it: what lets streams of any length share one forward pass.

A pass is one packed row of N tokens: first one token per decoding stream, then pieces of prompts (segments). transformers' own modules
compute it; only the cache (`SlotCache`, a transformers Cache) and the attention function (registered as "r1ray_slots") are ours.
Nothing is padded, and the cache of decoding streams is read in place. Knows no requests and no sampling.

Shapes: N packed tokens, R decoding rows, L longest row, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from r1ray.errors import UnsupportedModel

__all__ = ["ATTENTION", "Layout", "Piece", "SlotCache"]

ATTENTION = "r1ray_slots"
ROUND_CAPACITY = 256  # positions


@dataclass(frozen=True, slots=True)
class Piece:
    """`num` prompt tokens of row `slot`, at positions from `start` on."""

    slot: int
    start: int
    num: int


@dataclass(slots=True)
class Layout:
    """Where the packed tokens of one pass belong.

    `rows`: slots of the decoding tokens; `lengths`: positions that each of them sees, its own included.
    """

    rows: list[int]
    lengths: list[int]
    pieces: list[Piece]
    device: torch.device
    slot_index_N: Tensor = field(init=False)
    position_N: Tensor = field(init=False)
    row_select: slice | Tensor = field(init=False)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        slots = self.rows + [p.slot for p in self.pieces for _ in range(p.num)]
        positions = [n - 1 for n in self.lengths] + [p.start + i for p in self.pieces for i in range(p.num)]
        self.slot_index_N, self.position_N = torch.tensor([slots, positions], device=self.device).unbind()
        in_front = self.rows == list(range(len(self.rows)))
        self.row_select = slice(0, len(self.rows)) if in_front else torch.tensor(self.rows, device=self.device)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def num_positions(self) -> int:
        """Capacity that this pass needs."""
        return max(self.longest, max((p.start + p.num for p in self.pieces), default=0))

    def row_mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, L) true where a decoding token may look; None when it may look everywhere."""
        if (-1, window) not in self._masks:
            self._masks[-1, window] = self._row_mask(window)
        return self._masks[-1, window]

    def _row_mask(self, window: int | None) -> Tensor | None:
        if window is None and min(self.lengths) == self.longest:
            return None
        lengths_R1 = torch.tensor(self.lengths, device=self.device)[:, None]
        key_L = torch.arange(self.longest, device=self.device)
        mask_RL = key_L < lengths_R1
        if window is not None:
            mask_RL &= key_L >= lengths_R1 - window
        return mask_RL[:, None, None, :]

    def piece_mask(self, index: int, window: int | None) -> Tensor | None:
        """(num, start + num) causal mask of a segment; None when it is the plain triangle."""
        if (index, window) not in self._masks:
            self._masks[index, window] = self._piece_mask(self.pieces[index], window)
        return self._masks[index, window]

    def _piece_mask(self, piece: Piece, window: int | None) -> Tensor | None:
        if piece.start == 0 and (window is None or window >= piece.num):
            return None
        query_n1 = torch.arange(piece.start, piece.start + piece.num, device=self.device)[:, None]
        key_L = torch.arange(piece.start + piece.num, device=self.device)
        mask = key_L <= query_n1
        return mask if window is None else mask & (key_L > query_n1 - window)


class SlotCache(Cache):
    """Keys and values of every layer: (num_slots, K, capacity, D), allocated at first use and doubled when a stream outgrows it.

    `latent` (DeepSeek's MLA): the model caches compressed latents and expands them itself, so `update` hands back all that the pass
    reads, packed; otherwise the attention reads the cache in place.
    """

    def __init__(self, *, num_slots: int, latent: bool = False) -> None:
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.latent = latent
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = 0
        self.layout: Layout

    def begin(self, layout: Layout) -> None:
        """Every pass starts with this."""
        self.layout = layout
        if layout.num_positions > self.capacity:
            self._grow(max(layout.num_positions, 2 * self.capacity))

    def _grow(self, positions: int) -> None:
        self.capacity = -(-positions // ROUND_CAPACITY) * ROUND_CAPACITY
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = self._empty_like(old)
                tensors[i][:, :, : old.shape[2]] = old

    def _empty_like(self, states: Tensor) -> Tensor:
        # zeros, not empty: a masked NaN left in memory would still spoil the sum over values
        return states.new_zeros(self.num_slots, states.shape[1], self.capacity, states.shape[3])

    def move(self, source: int, target: int, num: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :num] = tensor[source, :, :num]

    def clear(self, slot: int) -> None:
        """Forget what a failed stream may have left."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values, each (1, K, N, D)."""
        if layer_idx >= len(self.keys):
            self.keys.append(self._empty_like(key_states))
            self.values.append(self._empty_like(value_states))
        layout = self.layout
        self.keys[layer_idx][layout.slot_index_N, :, layout.position_N] = key_states[0].transpose(0, 1)
        self.values[layer_idx][layout.slot_index_N, :, layout.position_N] = value_states[0].transpose(0, 1)
        if self.latent:
            return self._packed(self.keys[layer_idx]), self._packed(self.values[layer_idx])
        return key_states, value_states

    def _packed(self, cached: Tensor) -> Tensor:
        """(1, K, R * L + all segments' positions, D): what `_split` takes apart again."""
        layout = self.layout
        parts = [cached[p.slot, :, : p.start + p.num] for p in layout.pieces]
        if layout.rows:
            parts.insert(0, cached[layout.row_select, :, : layout.longest].transpose(0, 1).flatten(1, 2))
        return torch.cat(parts, dim=1)[None]

    def read(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor] | None, list[tuple[Tensor, Tensor]]]:
        """Keys and values (R, K, L, D) of the decoding rows and (1, K, start + num, D) of each segment."""
        if self.latent:
            keys, values = self._split(key), self._split(value)
        else:
            keys, values = self._views(self.keys[layer_idx]), self._views(self.values[layer_idx])
        pairs = list(zip(keys, values, strict=True))
        return (pairs[0], pairs[1:]) if self.layout.rows else (None, pairs)

    def _views(self, cached: Tensor) -> list[Tensor]:
        layout = self.layout
        parts = [cached[p.slot : p.slot + 1, :, : p.start + p.num] for p in layout.pieces]
        return [cached[layout.row_select, :, : layout.longest], *parts] if layout.rows else parts

    def _split(self, packed: Tensor) -> list[Tensor]:
        layout = self.layout
        num_rows = len(layout.rows)
        sizes = [p.start + p.num for p in layout.pieces]
        if not num_rows:
            return list(torch.split(packed, sizes, dim=2))
        front, *rest = torch.split(packed, [num_rows * layout.longest, *sizes], dim=2)
        return [torch.unflatten(front[0], 1, (num_rows, layout.longest)).transpose(0, 1), *rest]


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """transformers' attention signature: query (1, H, N, D) in, (1, N, H, D) out."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UnsupportedModel(f"{type(module).__name__} uses soft-capped or sink attention, which the torch engine does not compute.")
    cache: SlotCache = options["slots"]
    scale, window = options.get("scaling"), options.get("sliding_window")
    rows, pieces = cache.read(module.layer_idx, key, value)  # type: ignore[arg-type]
    outputs = [_attend_rows(query, *rows, cache.layout.row_mask(window), scale)] if rows else []
    offset = len(cache.layout.rows)
    for index, (piece, (keys, values)) in enumerate(zip(cache.layout.pieces, pieces, strict=True)):
        mask = cache.layout.piece_mask(index, window)
        part = query[:, :, offset : offset + piece.num]
        gqa = part.shape[1] != keys.shape[1]
        out = scaled_dot_product_attention(part, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        outputs.append(out[0].transpose(0, 1))
        offset += piece.num
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One query per row, its heads grouped under their key head, so that no key is repeated: (R, H, D)."""
    num_rows, num_heads = keys.shape[:2]
    grouped = torch.unflatten(query[0, :, :num_rows].transpose(0, 1), 1, (num_heads, -1))
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


AttentionInterface.register(ATTENTION, attend)
