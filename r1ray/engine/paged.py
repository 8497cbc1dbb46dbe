"""The general backend: any causal LM of transformers that takes an attention function, on any device, over the paged KV cache.

transformers' own modules compute a packed pass of N tokens: first one token per decoding stream, then pieces of prompts. Only the cache
(`pages.PagedCache`, a transformers Cache) and the attention function (`attention.attend`) are ours. Knows no requests.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1ray.engine.adapters import Adapters
from r1ray.engine.attention import ATTENTION, leave_latents
from r1ray.engine.backend import Immediate, Piece
from r1ray.engine.compiled import CompiledDecode, Compiler, DecodeShapes, inductor
from r1ray.engine.memory import CacheWish, Room, room_on
from r1ray.engine.pages import PagedCache
from r1ray.errors import UnsupportedModel
from r1ray.model.soft import SoftPrompt

__all__ = ["TransformersBackend", "kv_bytes_per_token"]

GATHER_BYTES = 256 * 2**20  # keys and values of decoding rows, or expanded latents, that a layer holds at once
log = logging.getLogger(__name__)


class TransformersBackend(Immediate):
    """Takes the model over: call it directly no more. A model of some layers (`partial.load_layers`) is one stage of a pipeline.

    Without `num_blocks` the cache waits for `allocate`, so that it can be sized by what the loaded model has left.
    """

    def __init__(self, model: PreTrainedModel, *, num_blocks: int | None = None, gather_bytes: int = GATHER_BYTES) -> None:
        _check_supported(model)
        self._model = model.eval()
        self._model.set_attn_implementation(ATTENTION)
        self._adapters = Adapters(model)
        latent = _is_latent(model.config)
        if latent:
            leave_latents(model)
        self._cache = PagedCache(latent=latent, gather_bytes=gather_bytes)
        self._compiled: CompiledDecode | None = None
        self.num_blocks = 0
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.precision = str(model.dtype).removeprefix("torch.")
        if num_blocks is not None:
            self.allocate(num_blocks)

    def room(self, wish: CacheWish, *, compiles: bool = False) -> Room:
        """What is left after loading. Tensor ranks ask at the same time: a token is computed to see what each layer keeps of it.

        `compiles`: beside the eager passes, whose memory CUDA graphs cannot use.
        """
        self._try()
        workspace = self._workspace_bytes(wish) * (2 if compiles else 1)
        return room_on(str(self._model.device), self._cache.bytes_per_block, workspace)

    def allocate(self, num_blocks: int) -> None:
        """The KV cache, once, before the first pass."""
        self._try()
        self._cache.allocate(num_blocks)
        self.num_blocks = num_blocks

    def compile_decode(self, wish: CacheWish, *, exact: bool | None = None, compiler: Compiler = inductor) -> None:
        """Compile decoding passes of up to `num_slots` streams and `context` positions, after `allocate`; says in the log why it cannot.

        `exact`: passes are not padded; by default where no CUDA graph wants fixed shapes.
        """
        shapes = DecodeShapes(
            num_slots=wish.num_slots,
            context=wish.context,
            most_positions=self._cache.most_positions,
            exact=self._model.device.type != "cuda" if exact is None else exact,
        )
        self._cache.allocate(self.num_blocks + 1)  # padded rows write into the last one
        try:
            with torch.inference_mode():
                compiled = CompiledDecode(self._model, self._cache, shapes, compiler)
                compiled.warm_up(self.forward)
        except Exception as error:  # torch.export, Inductor and the C++ compiler raise what they like
            log.warning("compiled decode: none, %s stays eager: %s", type(self._model).__name__, _first_line(error))
            self._cache.allocate(self.num_blocks)
        else:
            self._compiled = compiled

    def _try(self) -> None:
        if self._cache.keys:
            return
        is_first = not isinstance(self._model.get_input_embeddings(), torch.nn.Identity)
        hidden = None if is_first else torch.zeros(1, self._model.config.get_text_config().hidden_size)
        self.stage([Piece(ids=[0], start=0, table=[0], num_logits=1)], hidden)

    def _workspace_bytes(self, wish: CacheWish) -> int:
        """Beside the cache: gathered keys, a long prompt's mask, activations of the largest pass and the logits that are drawn from."""
        config = self._model.config.get_text_config()
        size, tokens = self._model.dtype.itemsize, wish.largest_pass
        row = self._cache.position_bytes * wish.context
        widest = max(getattr(config, "intermediate_size", None) or 0, 4 * config.hidden_size)
        activations = tokens * size * (8 * config.hidden_size + 3 * widest)
        logits = config.vocab_size * max(tokens * size, 16 * wish.num_slots)
        mask = (tokens - wish.num_slots) * wish.context * (1 + size)
        return 2 * max(self._cache.gather_bytes, row) + activations + logits + mask

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """One pass per adapter: PEFT's layers apply one adapter at a time. The model alone is compiled, not its adapters."""
        if self._compiled is not None and not any(piece.adapter for piece in pieces):
            with torch.inference_mode():
                if (found := self._compiled.logits(pieces)) is not None:
                    return found
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

    @torch.inference_mode()
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
        self._cache.begin([piece], self._model.device)
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

    @torch.inference_mode()
    def _pass(self, pieces: Sequence[Piece], hidden: Tensor | None, wanted: Sequence[int] | None) -> Tensor:
        """Logits of the `wanted` tokens, or, where that is None, the (N, hidden) states after this model's layers."""
        device = self._model.device
        layout = self._cache.begin(pieces, device)
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


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Room that one position takes in a cache over all layers, from the configuration alone: for engines that allocate it themselves."""
    if _is_latent(config):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    return int(numbers * config.num_hidden_layers * dtype.itemsize)


def _is_latent(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


def _check_supported(model: PreTrainedModel) -> None:
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{type(model).__name__} has {sorted(unknown)} layers; the torch engine computes softmax attention only.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{type(model).__name__} does not take an attention function, as the torch engine needs. Use another one.")


def _first_line(error: Exception) -> str:
    """Of errors that are pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
