"""LoRA adapters for the kernels: read from a PEFT directory, many at once in a batch, each row with its own.

Plain LoRA on the seven projections. What the kernels cannot apply beside others is refused with the way out: merge it.

Shapes: r rank, N outputs, K inputs; A (r, K), B (N, r).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from r1ray.engine.native import structs
from r1ray.engine.native.weights import PANEL
from r1ray.errors import AdapterMismatch
from r1ray.model.lora import read_lora

if TYPE_CHECKING:
    from r1ray.engine.native.model import Shape

__all__ = ["LoraTable", "read_adapter"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight$")

Lora = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, projection) -> A (r, K) and B transposed to (r, N) with the scale in it, float32."""


def read_adapter(path: Path, shape: Shape, layers: range) -> Lora:
    """The adapter's matrices of these layers.

    Raises:
        AdapterMismatch: no plain LoRA adapter lies there, or a matrix has another shape than the model's.
    """
    adapter: Lora = {}
    for name, (a, b) in read_lora(path).items():
        if (found := _NAME.match(name)) is None or found[2] not in PROJECTIONS:
            raise AdapterMismatch(f"The adapter at {path} changes {name}; the CPU kernels take LoRA on the projections only. Merge it.")
        layer, which = int(found[1]), found[2]
        n, k = _sizes(shape)[which]
        if (b.shape[0], a.shape[1]) != (n, k) or layer >= shape.num_layers:
            raise AdapterMismatch(
                f"The adapter at {path} does not fit: its update of {name} is {(b.shape[0], a.shape[1])}, the model has "
                f"{shape.num_layers} layers of {(n, k)} there. Train it on this base."
            )
        if layer in layers:
            adapter[layer, which] = (a.contiguous(), b.T.contiguous())
    return adapter


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

    def put(self, name: str, lora: Lora) -> None:
        """Between two passes only: the old matrices are freed."""
        self._entries[name] = [self._struct(lora, layer, which) for layer in range(self.first, self.last) for which in PROJECTIONS]
        self._held[name] = lora

    def drop(self, name: str) -> None:
        """Between two passes only."""
        del self._entries[name], self._held[name]

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
