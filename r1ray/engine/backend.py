"""The seam between the engine's loop and whatever multiplies: pieces of streams in, logits out.

A backend owns weights, the paged KV cache and adapters, and is called from the engine's thread only. It knows no request, no queue
and no sampling. Implemented by `native` (compiled CPU kernels) and `paged` (transformers' own modules, any device).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

__all__ = ["BLOCK_SIZE", "Backend", "Piece"]

BLOCK_SIZE = 32
"""Positions of a KV block; the native kernels' panels are as wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive tokens of one stream in one pass.

    `table[i]` is the KV block of positions [32 i, 32 i + 32). `start` is the position of the first token: everything before it is in
    the cache already. `num_logits`: of how many of its last tokens the logits are wanted.
    """

    ids: Sequence[int]
    start: int
    table: Sequence[int]
    num_logits: int
    adapter: str | None = None


class Backend(Protocol):
    """`precision` names what the weights are held in; `adapters` those that `Piece.adapter` may name."""

    vocab_size: int
    num_blocks: int
    precision: str

    @property
    def adapters(self) -> frozenset[str]: ...

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute all pieces in one pass: (W, vocab_size) logits of the tokens that want them, in order."""

    def load_adapter(self, name: str, path: Path) -> None:
        """Take the PEFT directory at `path`; replaces an adapter of that name.

        Raises:
            AdapterMismatch: no adapter lies there, or it is not one of this model.
        """

    def clear(self, blocks: Sequence[int]) -> None:
        """Overwrite what a failed stream may have left: a NaN under a mask would still spoil the next owner's sums."""

    def close(self) -> None:
        """Give threads and memory back; the backend is not used any more."""
