"""The seam between the engine's loop and whatever multiplies: pieces of streams in, logits out.

A backend owns weights, the paged KV cache and adapters, and is called from the engine's thread only. It knows no request, no queue
and no sampling. Implemented by `native` (compiled CPU kernels) and `paged` (transformers' own modules, any device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BLOCK_SIZE", "OUT_OF_MEMORY", "Backend", "Immediate", "Piece"]

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What `submit` may raise and be asked again for less: nothing of the pass counts as written."""

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


class Immediate:
    """What a backend in one process inherits: a submitted pass is computed at once, and nobody can be lost."""

    depth = 1
    lacks: frozenset[str] = frozenset()

    def submit(self, pieces: Sequence[Piece]) -> object:
        return self.forward(pieces)  # type: ignore[attr-defined]

    def collect(self, submitted: object) -> Tensor:
        assert isinstance(submitted, Tensor)
        return submitted

    def watch(self, lost: Callable[[str], None]) -> None:
        """Nothing to watch."""


class Backend(Protocol):
    """`precision` names what the weights are held in.

    `lacks` are the engine's capabilities that need more than logits and are not to be had here.
    """

    vocab_size: int
    num_blocks: int
    precision: str
    lacks: frozenset[str]

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute all pieces in one pass: (W, vocab_size) logits of the tokens that want them, in order."""

    @property
    def depth(self) -> int:
        """Passes that may be under way at once; more than one in a pipeline."""

    def submit(self, pieces: Sequence[Piece]) -> object:
        """Begin a pass. Passes read and write the cache in the order they were submitted."""

    def collect(self, submitted: object) -> Tensor:
        """The logits of the oldest pass that was not collected yet; waits for it."""

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost` with the reason, from any thread, when a process that this backend needs dies, even while nothing is computed."""

    def load_adapter(self, name: str, path: Path) -> None:
        """Take the PEFT directory at `path`; replaces an adapter of that name.

        Raises:
            AdapterMismatch: no adapter lies there, or it is not one of this model; one of that name stays as it was.
        """

    def unload_adapter(self, name: str) -> None:
        """Give the memory of a loaded adapter back; no piece names it any more."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Overwrite what a failed stream may have left: a NaN under a mask would still spoil the next owner's sums."""

    def close(self) -> None:
        """Give threads and memory back; the backend is not used any more."""
