"""The general backend: any causal LM of transformers that takes an attention function, on any device, over the paged KV cache.

transformers' own modules compute a packed pass of N tokens: first one token per decoding stream, then pieces of prompts. Only the cache
(`PagedCache`, a transformers Cache) and the attention function (registered as "r1ray_paged") are ours. Knows no requests.

Shapes: N packed tokens, R decoding rows, L longest row, H query heads, K key heads, D head size, B blocks.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from r1ray.engine.adapters import Adapters
from r1ray.engine.backend import BLOCK_SIZE, Immediate, Piece
from r1ray.errors import UnsupportedModel
from r1ray.model.soft import SoftPrompt

__all__ = ["ATTENTION", "TransformersBackend", "kv_bytes_per_token"]

ATTENTION = "r1ray_paged"
log = logging.getLogger(__name__)


class TransformersBackend(Immediate):
    """Takes the model over: call it directly no more. A model of some layers (`partial.load_layers`) is one stage of a pipeline."""

    def __init__(self, model: PreTrainedModel, *, num_blocks: int) -> None:
        _check_supported(model)
        self._model = model.eval()
        self._model.set_attn_implementation(ATTENTION)
        self._adapters = Adapters(model)
        self._cache = PagedCache(num_blocks=num_blocks, latent=_is_latent(model.config))
        self.num_blocks = num_blocks
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.precision = str(model.dtype).removeprefix("torch.")

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """One pass per adapter: PEFT's layers apply one adapter at a time."""
        logits: dict[int, list[Tensor]] = {}
        for adapter in {piece.adapter: None for piece in pieces}:
            chosen = [(number, piece) for number, piece in enumerate(pieces) if piece.adapter == adapter]
            chosen.sort(key=lambda entry: len(entry[1].ids) > 1)  # decoding rows first
            self._adapters.activate(adapter)
            packed = [piece for _, piece in chosen]
            rows = iter(self._pass(packed, None, wanted_tokens(packed)))
            logits |= {number: list(itertools.islice(rows, piece.num_logits)) for number, piece in chosen}
        ordered = [row for number in sorted(logits) for row in logits[number]]
        return torch.stack(ordered) if ordered else torch.empty(0, self.vocab_size)

    def put(self, piece: Piece, soft: SoftPrompt) -> None:
        """Write a prefix's keys and values where the piece's would go.

        Raises:
            UnsupportedModel: the model caches latents (DeepSeek's MLA), not keys and values.
        """
        config = self._model.config.get_text_config()
        if self._cache.latent:
            raise UnsupportedModel(
                f"{type(self._model).__name__} caches latents: prefix tuning has no place there. Use prompt tuning or LoRA."
            )
        self._cache.begin(Layout([piece], self._model.device))
        pairs = soft.keys_and_values(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        for layer, (key, value) in enumerate(pairs.to(self._model.device, self._model.dtype)):
            self._cache.update(key[None], value[None], layer)

    def load_adapter(self, name: str, path: Path) -> None:
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        self._adapters.unload(name)

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)

    def close(self) -> None:
        """Nothing runs beside the engine's own thread."""

    def stage(self, pieces: Sequence[Piece], hidden: Tensor | None) -> Tensor:
        """One stage of a pipeline: (tokens, hidden) states in (None at the first), the same out, or logits at the last.

        `pieces` have the decoding ones first. Adapters are not switched between them: a pipeline serves one merged model.
        """
        is_last = not isinstance(self._model.get_output_embeddings(), torch.nn.Identity)
        return self._pass(pieces, hidden, wanted_tokens(pieces) if is_last else None)

    def _pass(self, pieces: Sequence[Piece], hidden: Tensor | None, wanted: Sequence[int] | None) -> Tensor:
        """Logits of the `wanted` tokens, or, where that is None, the (N, hidden) states after this model's layers."""
        device = self._model.device
        layout = Layout(pieces, device)
        self._cache.begin(layout)
        inputs: dict[str, Any] = {"position_ids": layout.position_N[None], "past_key_values": self._cache, "use_cache": True}
        if hidden is None:
            inputs["input_ids"] = torch.tensor([[i for piece in pieces for i in piece.ids]], device=device)
        else:
            inputs["inputs_embeds"] = hidden[None].to(device, self._model.dtype)
        if wanted is None:
            states: Tensor = self._model.model(**inputs, pages=self._cache).last_hidden_state[0]
            return states
        logits: Tensor = self._model(**inputs, logits_to_keep=torch.tensor(wanted or [0], device=device), pages=self._cache).logits[0]
        return logits if wanted else logits[:0]


def wanted_tokens(pieces: Sequence[Piece]) -> list[int]:
    """Indices of the packed tokens whose logits are wanted."""
    ends = itertools.accumulate(len(piece.ids) for piece in pieces)
    return [i for end, piece in zip(ends, pieces, strict=True) for i in range(end - piece.num_logits, end)]


def kv_bytes_per_token(config: Any, dtype: torch.dtype, *, num_tensor: int = 1) -> int:
    """Room that one position takes in the cache over all layers: each of `num_tensor` ranks has its own key heads, but every latent."""
    if _is_latent(config):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim // num_tensor
    return int(numbers * config.num_hidden_layers * dtype.itemsize)


def _is_latent(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


@dataclass(slots=True)
class Layout:
    """Where the packed tokens of one pass belong. `pieces` has the decoding ones (one token each) first."""

    pieces: Sequence[Piece]
    device: torch.device
    rows: int = field(init=False)
    longest: int = field(init=False)
    block_N: Tensor = field(init=False)
    offset_N: Tensor = field(init=False)
    position_N: Tensor = field(init=False)
    table_RB: Tensor = field(init=False)
    tables: list[Tensor] = field(init=False)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = next((i for i, piece in enumerate(self.pieces) if len(piece.ids) > 1), len(self.pieces))
        positions = [piece.start + i for piece in self.pieces for i in range(len(piece.ids))]
        blocks = [piece.table[(piece.start + i) // BLOCK_SIZE] for piece in self.pieces for i in range(len(piece.ids))]
        self.block_N, self.position_N = torch.tensor([blocks, positions], device=self.device).unbind()
        self.offset_N = self.position_N % BLOCK_SIZE
        decoding = self.pieces[: self.rows]
        self.longest = max((piece.start + 1 for piece in decoding), default=0)
        most = -(-self.longest // BLOCK_SIZE)
        tables = [[*piece.table[:most], *([piece.table[0]] * (most - len(piece.table)))] for piece in decoding]
        self.table_RB = torch.tensor(tables, dtype=torch.long, device=self.device).view(self.rows, most)
        self.tables = [
            torch.tensor(piece.table[: -(-(piece.start + len(piece.ids)) // BLOCK_SIZE)], device=self.device)
            for piece in self.pieces[self.rows :]
        ]

    def row_mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, L) true where a decoding token may look; None when it may look everywhere."""
        if (-1, window) not in self._masks:
            self._masks[-1, window] = self._row_mask(window)
        return self._masks[-1, window]

    def _row_mask(self, window: int | None) -> Tensor | None:
        position_R1 = self.position_N[: self.rows, None]
        if window is None and bool((position_R1 == self.longest - 1).all()):
            return None
        key_L = torch.arange(self.longest, device=self.device)
        mask_RL = key_L <= position_R1
        if window is not None:
            mask_RL &= key_L > position_R1 - window
        return mask_RL[:, None, None, :]

    def piece_mask(self, index: int, window: int | None) -> Tensor | None:
        """(num, start + num) causal mask of a prompt piece; None when it is the plain triangle."""
        if (index, window) not in self._masks:
            self._masks[index, window] = self._piece_mask(self.pieces[self.rows + index], window)
        return self._masks[index, window]

    def _piece_mask(self, piece: Piece, window: int | None) -> Tensor | None:
        num = len(piece.ids)
        if piece.start == 0 and (window is None or window >= num):
            return None
        query_n1 = torch.arange(piece.start, piece.start + num, device=self.device)[:, None]
        key_L = torch.arange(piece.start + num, device=self.device)
        mask = key_L <= query_n1
        return mask if window is None else mask & (key_L > query_n1 - window)


class PagedCache(Cache):
    """Keys and values of every layer: (num_blocks, BLOCK_SIZE, K, D), allocated at first use.

    Positions come before heads, so that a gathered table is one row of positions. `latent` (DeepSeek's MLA): the model caches
    compressed latents and expands them itself, so `update` hands back all that the pass reads, packed.
    """

    def __init__(self, *, num_blocks: int, latent: bool = False) -> None:
        super().__init__(layers=[])
        self.num_blocks = num_blocks
        self.latent = latent
        self.keys: dict[int, Tensor] = {}  # by the layer's number in the whole model
        self.values: dict[int, Tensor] = {}
        self.layout: Layout

    def begin(self, layout: Layout) -> None:
        """Every pass starts with this."""
        self.layout = layout

    def clear(self, blocks: Sequence[int]) -> None:
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[list(blocks)] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values, each (1, K, N, D)."""
        if layer_idx not in self.keys:
            for tensors, states in ((self.keys, key_states), (self.values, value_states)):
                # zeros, not empty: a masked NaN left in memory would still spoil the sum over values
                tensors[layer_idx] = states.new_zeros(self.num_blocks, BLOCK_SIZE, states.shape[1], states.shape[3])
        layout = self.layout
        self.keys[layer_idx][layout.block_N, layout.offset_N] = key_states[0].transpose(0, 1)
        self.values[layer_idx][layout.block_N, layout.offset_N] = value_states[0].transpose(0, 1)
        if self.latent:
            return self._packed(self.keys[layer_idx]), self._packed(self.values[layer_idx])
        return key_states, value_states

    def read(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor] | None, list[tuple[Tensor, Tensor]]]:
        """Keys and values (R, K, L, D) of the decoding rows and (1, K, start + num, D) of each piece."""
        if self.latent:
            keys, values = self._split(key), self._split(value)
        else:
            keys, values = self._gathered(self.keys[layer_idx]), self._gathered(self.values[layer_idx])
        pairs = list(zip(keys, values, strict=True))
        return (pairs[0], pairs[1:]) if self.layout.rows else (None, pairs)

    def _gathered(self, cached: Tensor) -> list[Tensor]:
        """Decoding rows (R, K, L, D) when there are any, then a (1, K, length, D) for each piece."""
        layout = self.layout
        parts = [
            cached[table].flatten(0, 1)[: piece.start + len(piece.ids)].transpose(0, 1)[None]
            for piece, table in zip(layout.pieces[layout.rows :], layout.tables, strict=True)
        ]
        if not layout.rows:
            return parts
        return [cached[layout.table_RB].flatten(1, 2)[:, : layout.longest].transpose(1, 2), *parts]

    def _packed(self, cached: Tensor) -> Tensor:
        """(1, K, R * L + all pieces' positions, D): what `_split` takes apart again."""
        parts = self._gathered(cached)
        if self.layout.rows:
            parts[0] = parts[0].transpose(0, 1).flatten(1, 2)[None]
        return torch.cat(parts, dim=2)

    def _split(self, packed: Tensor) -> list[Tensor]:
        layout = self.layout
        sizes = [piece.start + len(piece.ids) for piece in layout.pieces[layout.rows :]]
        if not layout.rows:
            return list(torch.split(packed, sizes, dim=2))
        front, *rest = torch.split(packed, [layout.rows * layout.longest, *sizes], dim=2)
        return [torch.unflatten(front[0], 1, (layout.rows, layout.longest)).transpose(0, 1), *rest]


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """transformers' attention signature: query (1, H, N, D) in, (1, N, H, D) out."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UnsupportedModel(f"{type(module).__name__} uses soft-capped or sink attention, which the torch engine does not compute.")
    cache: PagedCache = options["pages"]
    scale, window = options.get("scaling"), options.get("sliding_window")
    rows, pieces = cache.read(module.layer_idx, key, value)  # type: ignore[arg-type]
    offset = cache.layout.rows
    outputs = [_attend_rows(query[:, :, :offset], *rows, cache.layout.row_mask(window), scale)] if rows else []
    for index, (keys, values) in enumerate(pieces):
        mask = cache.layout.piece_mask(index, window)
        num = len(cache.layout.pieces[cache.layout.rows + index].ids)
        part = query[:, :, offset : offset + num]
        gqa = part.shape[1] != keys.shape[1]
        out = scaled_dot_product_attention(part, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        outputs.append(out[0].transpose(0, 1))
        offset += num
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One query per row, its heads grouped under their key head, so that no key is repeated: (R, H, D)."""
    grouped = torch.unflatten(query[0].transpose(0, 1), 1, (keys.shape[1], -1))
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


def _check_supported(model: PreTrainedModel) -> None:
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{type(model).__name__} has {sorted(unknown)} layers; the torch engine computes softmax attention only.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{type(model).__name__} does not take an attention function, as the torch engine needs. Use another one.")


AttentionInterface.register(ATTENTION, attend)
