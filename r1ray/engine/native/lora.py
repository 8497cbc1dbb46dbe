"""LoRA adapters for the kernels: read from a PEFT directory, many at once in a batch, each row with its own.

Plain LoRA on the seven projections (rank-stabilised scaling included). What the kernels cannot apply beside others, such as DoRA or
trained biases, is refused with the way out: merge it.

Shapes: r rank, N outputs, K inputs; A (r, K), B (N, r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from r1ray.engine.native import structs
from r1ray.engine.native.weights import PANEL
from r1ray.errors import AdapterMismatch

if TYPE_CHECKING:
    from r1ray.engine.native.model import Shape

__all__ = ["LoraTable", "read_lora"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight$")

Pair = tuple[Tensor, Tensor]
Lora = dict[tuple[int, str], Pair]
"""(layer, projection) -> A (r, K) and B transposed to (r, N) with the scale in it, float32."""


def read_lora(path: Path, shape: Shape, layers: range) -> Lora:
    """The adapter's matrices of these layers.

    Raises:
        AdapterMismatch: no adapter lies there, it is no plain LoRA, or a matrix has another shape than the model's.
    """
    from safetensors.torch import load_file

    if not (path / "adapter_config.json").is_file():
        raise AdapterMismatch(f"{path} holds no adapter_config.json. Give the directory of a PEFT adapter.")
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    _check_kind(config, path)
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        if (found := _NAME.search(name)) is None or found[2] not in PROJECTIONS:
            raise AdapterMismatch(f"The adapter at {path} changes {name}; the CPU kernels take LoRA on the projections only. Merge it.")
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor
    return {place: _pair(config, place, pair, shape, path) for place, pair in halves.items() if place[0] in layers}


def _check_kind(config: dict[str, Any], path: Path) -> None:
    wrong = [key for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or wrong:
        what = config.get("peft_type") if config.get("peft_type") != "LORA" else ", ".join(wrong) or "trained biases"
        raise AdapterMismatch(
            f"The adapter at {path} is more than plain LoRA ({what}); the CPU kernels cannot apply it beside others. "
            "Merge it, or set engine.backend=transformers."
        )


def _pair(config: dict[str, Any], place: tuple[int, str], halves: dict[str, Tensor], shape: Shape, path: Path) -> Pair:
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    n, k = _sizes(shape)[place[1]]
    if set(halves) != {"A", "B"} or halves["A"].shape != (rank, k) or halves["B"].shape != (n, rank) or place[0] >= shape.num_layers:
        shapes = {half: tuple(tensor.shape) for half, tensor in halves.items()}
        raise AdapterMismatch(
            f"The adapter at {path} does not fit: layer {place[0]} {place[1]} has {shapes}, the model wants A ({rank}, {k}) and "
            f"B ({n}, {rank}) in {shape.num_layers} layers. Train it on this base."
        )
    return halves["A"].float().contiguous(), (halves["B"].float().T * scale).contiguous()


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(N, K) of each projection."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, ffn = shape.hidden, shape.ffn
    sizes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (ffn, hidden), (ffn, hidden), (hidden, ffn))
    return dict(zip(PROJECTIONS, sizes, strict=True))


def _offsets(shape: Shape) -> dict[str, int]:
    """Where a projection's outputs begin in the buffer that the kernels add to."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"k_proj": query, "v_proj": query + key, "up_proj": -(-shape.ffn // PANEL) * PANEL}


@dataclass
class LoraTable:
    """The loaded adapters of layers [first, last) and their structs."""

    shape: Shape
    first: int
    last: int
    _entries: dict[str, list[structs.Lora]] = field(default_factory=dict)
    _held: dict[str, Lora] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def put(self, name: str, lora: Lora) -> None:
        """Between two passes only: the old matrices are freed."""
        self._entries[name] = [self._struct(lora, layer, which) for layer in range(self.first, self.last) for which in PROJECTIONS]
        self._held[name] = lora

    def of(self, adapters: Sequence[str | None]) -> tuple[Any, list[int]]:
        """The structs of the adapters in a batch, one after the other, and each piece's number among them, -1 for none."""
        used = sorted({name for name in adapters if name is not None})
        entries = [entry for name in used for entry in self._entries[name]]
        numbers = {name: number for number, name in enumerate(used)}
        return (structs.Lora * len(entries))(*entries), [-1 if name is None else numbers[name] for name in adapters]

    def _struct(self, lora: Lora, layer: int, which: str) -> structs.Lora:
        if (pair := lora.get((layer, which))) is None:
            return structs.Lora()
        a, b = pair
        return structs.Lora(a.shape[0], a.shape[1], b.shape[1], _offsets(self.shape).get(which, 0), a.data_ptr(), b.data_ptr())
