"""The compiled decoder behind the engine's Backend: packs a checkpoint, owns the paged KV cache, hands passes to the kernels.

Runs Llama, Qwen2 and Qwen3 (and what has their shape). `refusal` says why another model cannot run here; such models run on
transformers' own modules. A contiguous range of layers makes it one stage of a pipeline: floats in, floats out.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from r1ray.engine.backend import BLOCK_SIZE, Immediate, Piece
from r1ray.engine.config import Precision
from r1ray.engine.memory import CacheWish, Room, room_on
from r1ray.engine.native import build, structs
from r1ray.engine.native.lora import LoraTable, read_adapter
from r1ray.engine.native.prefix import write_blocks
from r1ray.engine.native.weights import KINDS, PANEL, Packed, interleave, pack
from r1ray.model.checkpoint import Tensors
from r1ray.model.soft import SoftPrompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["NativeModel", "NativeOptions", "Shape", "kv_bytes_per_token", "refusal"]

log = logging.getLogger(__name__)

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LARGEST_HEAD = 512
HEAD: dict[Precision, Precision] = {"int4": "int8"}  # rounded to int4 it alone costs 5 % of perplexity (docs/engines.md)
PARTS = ("start", "norm", "qkv", "rotate", "attention", "output", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a dense decoder."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    num_layers: int
    eps: float
    tied: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            num_layers=config.num_hidden_layers,
            eps=config.rms_norm_eps,
            tied=config.tie_word_embeddings,
        )


def refusal(config: PretrainedConfig, precision: Precision) -> str | None:
    """Why the kernels cannot run this model; None when they can."""
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not one of {', '.join(FAMILIES)}"
    shape = Shape.of(config)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    checks = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "biases in the MLP": bool(getattr(config, "mlp_bias", False)),
        "sliding-window layers": any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()),
        f"rotary positions of type {rope}": rope not in ROPE_TYPES,
        "a partial rotary dimension": float((config.rope_parameters or {}).get("partial_rotary_factor", 1.0)) != 1.0,
        f"a head size of {shape.head_dim}": bool(shape.head_dim % PANEL) or shape.head_dim > LARGEST_HEAD,
        f"sizes {shape.hidden} and {shape.ffn} in {precision}": precision in ("int8", "int4")
        and bool(shape.hidden % PANEL or shape.ffn % PANEL),
    }
    return next((what for what, wrong in checks.items() if wrong), None)


def kv_bytes_per_token(shape: Shape, precision: Precision, num_layers: int | None = None) -> int:
    """Room that one position takes in the cache; quantised models keep bfloat16 keys and values."""
    width = 4 if precision == "float32" else 2
    return 2 * shape.kv_heads * shape.head_dim * width * (num_layers or shape.num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOptions:
    """`num_blocks` of the KV cache, None where it waits for `allocate`; rotary tables reach to `context`; `layers` is [first, last)."""

    precision: Precision
    context: int
    num_blocks: int | None = None
    num_threads: int = 1
    layers: tuple[int, int] | None = None


class NativeModel(Immediate):
    """Layers [first, last) of a checkpoint; all of them by default."""

    def __init__(self, config: PretrainedConfig, tensors: Tensors, options: NativeOptions) -> None:
        self._library = build.library()
        self.shape = Shape.of(config)
        self.precision: str = options.precision
        self.vocab_size = self.shape.vocab
        self.num_blocks = 0
        self.first, self.last = options.layers or (0, self.shape.num_layers)
        self._loras = LoraTable(self.shape, self.first, self.last)
        self._kept: list[Any] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._decoder: int | None = None
        self._layers, self._model = self._pack_all(config, tensors, options)
        if options.num_blocks is not None:
            self.allocate(options.num_blocks)

    def room(self, _wish: CacheWish) -> Room:
        """What is left beside the packed weights."""
        num_layers = self.last - self.first
        precision = cast("Precision", self.precision)
        return room_on("cpu", kv_bytes_per_token(self.shape, precision, num_layers) * BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> None:
        """The KV cache, once, before the first pass."""
        self.num_blocks = num_blocks
        self._keys, self._values = self._cache(self.precision)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._decoder = int(self._library.r1ray_create(ctypes.byref(self._model)))

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        return self._run(pieces, None)[1]

    def stage(self, pieces: Sequence[Piece], hidden: Tensor | None) -> Tensor:
        """One stage of a pipeline: (tokens, hidden) floats in (None at the first), the same out, or logits at the last."""
        after, logits = self._run(pieces, hidden, keep=True)
        return logits if self.last == self.shape.num_layers else after

    def put(self, piece: Piece, soft: SoftPrompt) -> None:
        """Write a prefix's keys and values where the piece's would go."""
        pairs = soft.keys_and_values(self.shape.num_layers, self.shape.kv_heads)[self.first : self.last]
        for keys, values, (key_KPD, value_KPD) in zip(self._keys, self._values, pairs, strict=True):
            write_blocks(keys, values, piece.table, key_KPD, value_KPD)

    def load_adapter(self, name: str, path: Path) -> None:
        self._loras.put(name, read_adapter(path, self.shape, range(self.first, self.last)))

    def unload_adapter(self, name: str) -> None:
        self._loras.drop(name)

    def clear(self, blocks: Sequence[int]) -> None:
        for tensor in (*self._keys, *self._values):
            tensor[list(blocks)] = 0

    def profile(self) -> dict[str, float]:
        """Share of the first thread's time in each part of the passes since the last call; for the benchmark."""
        ticks = (ctypes.c_uint64 * len(PARTS))()
        self._library.r1ray_profile(self._decoder, ctypes.byref(ticks))
        total = sum(ticks) or 1
        return {part: tick / total for part, tick in zip(PARTS, ticks, strict=True)}

    def close(self) -> None:
        if self._decoder:
            self._library.r1ray_destroy(self._decoder)
            self._decoder = None

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self.close()

    # --- a pass

    def _run(self, pieces: Sequence[Piece], hidden: Tensor | None, *, keep: bool = False) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([i for piece in pieces for i in piece.ids], dtype=torch.int32)
        tables, most = _tables(pieces)
        loras, numbers = self._loras.of([piece.adapter for piece in pieces])
        segments, outputs = _segments(pieces, numbers)
        width = -(-self.vocab_size // PANEL) * PANEL
        is_last = self.last == self.shape.num_layers
        logits = torch.empty(len(outputs) if is_last else 0, width)
        rows = torch.empty(len(ids), self.shape.hidden) if keep else None
        if rows is not None and hidden is not None:
            rows.copy_(hidden)
        batch = structs.Batch(
            num_tokens=len(ids),
            num_segments=len(pieces),
            max_blocks=most,
            num_outputs=len(outputs),
            num_adapters=len(loras) // max(1, 7 * (self.last - self.first)),
            ids=ids.data_ptr() if hidden is None else None,
            segments=segments,
            tables=tables.data_ptr(),
            outputs=outputs.data_ptr(),
            hidden=None if rows is None else rows.data_ptr(),
            logits=logits.data_ptr() if is_last else None,
            loras=loras,
        )
        self._library.r1ray_forward(self._decoder, ctypes.byref(batch))
        return torch.empty(0) if rows is None else rows, logits[:, : self.vocab_size]

    # --- making it

    def _cache(self, precision: str) -> tuple[list[Tensor], list[Tensor]]:
        """Zeros: memory that was never written stays unmapped, and a masked NaN would spoil sums."""
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        size = (self.num_blocks, self.shape.kv_heads, self.shape.head_dim * BLOCK_SIZE)
        num = self.last - self.first
        return [torch.zeros(size, dtype=dtype) for _ in range(num)], [torch.zeros(size, dtype=dtype) for _ in range(num)]

    def _pack_all(self, config: PretrainedConfig, tensors: Tensors, options: NativeOptions) -> tuple[Any, structs.Model]:
        shape, precision = self.shape, options.precision
        full = precision == "float32"
        layers = (structs.Layer * (self.last - self.first))(
            *(self._layer(tensors, number, precision) for number in range(self.first, self.last))
        )
        cosine, sine, attention_scale = _rotary(config, shape.head_dim, options.context)
        model = structs.Model(
            **{name: getattr(shape, name) for name in ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "eps")},
            num_layers=len(layers),
            num_threads=options.num_threads,
            kv_kind=KINDS["float32" if full else "bfloat16"],
            embedding_kind=KINDS["float32" if full else "bfloat16"],
            scale=attention_scale,
            layers=layers,
            cosine=self._keep(cosine),
            sine=self._keep(sine),
        )
        ends = self.last == shape.num_layers
        if ends:
            head = _wanted(tensors, "model.embed_tokens.weight" if shape.tied else "lm_head.weight")
            model.final_norm = self._keep(_wanted(tensors, "model.norm.weight").float())
            model.head = self._pack(head, HEAD.get(precision, precision))
        if self.first == 0 and not (ends and shape.tied and precision in ("float32", "bfloat16")):
            # asked for anew: of a mapping of its own only the rows in use stay in memory
            embedding = _wanted(tensors, "model.embed_tokens.weight")
            model.embedding = self._keep(embedding.to(torch.float32 if full else torch.bfloat16).contiguous())
        return layers, model

    def _layer(self, tensors: Tensors, number: int, precision: Precision) -> structs.Layer:
        name = f"model.layers.{number}."

        def joined(part: str) -> Tensor | None:
            parts = [tensors(f"{name}self_attn.{which}_proj.{part}") for which in "qkv"]
            return None if parts[0] is None else torch.cat([p for p in parts if p is not None])

        def norm(which: str) -> int | None:
            tensor = tensors(f"{name}{which}.weight")
            return None if tensor is None else self._keep(tensor.float().contiguous())

        weight = joined("weight")
        if weight is None:
            raise KeyError(f"{name}self_attn.q_proj.weight")
        gate, up = (_wanted(tensors, f"{name}mlp.{which}_proj.weight") for which in ("gate", "up"))
        return structs.Layer(
            input_norm=norm("input_layernorm"),
            post_norm=norm("post_attention_layernorm"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            qkv=self._pack(weight, precision, joined("bias")),
            o=self._pack(_wanted(tensors, f"{name}self_attn.o_proj.weight"), precision, tensors(f"{name}self_attn.o_proj.bias")),
            gate_up=self._pack(interleave(gate, up), precision),
            down=self._pack(_wanted(tensors, f"{name}mlp.down_proj.weight"), precision),
        )

    def _pack(self, weight: Tensor, precision: Precision, bias: Tensor | None = None) -> structs.Linear:
        packed: Packed = pack(weight, precision, bias)
        self._kept.append(packed)
        return packed.struct()

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _wanted(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors(name)
    if tensor is None:
        raise KeyError(name)
    return tensor


def _tables(pieces: Sequence[Piece]) -> tuple[Tensor, int]:
    most = max(len(piece.table) for piece in pieces)
    return torch.tensor([[*piece.table, *([0] * (most - len(piece.table)))] for piece in pieces], dtype=torch.int32), most


def _segments(pieces: Sequence[Piece], adapters: Sequence[int]) -> tuple[Any, Tensor]:
    segments = (structs.Segment * len(pieces))()
    outputs: list[int] = []
    first = 0
    for number, (piece, adapter) in enumerate(zip(pieces, adapters, strict=True)):
        segments[number] = structs.Segment(first, len(piece.ids), piece.start, number, adapter)
        first += len(piece.ids)
        outputs.extend(range(first - piece.num_logits, first))
    return segments, torch.tensor(outputs, dtype=torch.int32)


def _rotary(config: PretrainedConfig, head_dim: int, context: int) -> tuple[Tensor, Tensor, float]:
    """cos and sin (context, D / 2), and the scale of the scores."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        frequency = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        factor = 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return (angle.cos() * factor).contiguous(), (angle.sin() * factor).contiguous(), 1.0 / math.sqrt(head_dim)
