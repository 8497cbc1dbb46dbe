"""A backend with a soft prompt before every stream: trained embeddings, or trained keys and values in each layer.

Its positions are computed once, into blocks of the KV cache that no stream owns and all streams read, so an answer costs no more
than the base's. The engine above sees a context that is shorter by them and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from r1ray.engine.backend import BLOCK_SIZE, Backend, Piece
from r1ray.errors import AdapterMismatch, UnsupportedModel
from r1ray.model.soft import SoftPrompt

__all__ = ["SoftPrompted", "check_soft_prompt"]


def check_soft_prompt(soft: SoftPrompt, hidden: int) -> None:
    """Raises AdapterMismatch: not of whole blocks, or of a model of another width."""
    if soft.num_tokens % BLOCK_SIZE:
        raise AdapterMismatch(
            f"The soft prompt has {soft.num_tokens} virtual tokens; the engine shares whole blocks of {BLOCK_SIZE} between streams. "
            f"Train it with train.prompt.num_virtual_tokens a multiple of {BLOCK_SIZE}."
        )
    if soft.kind == "prompt" and soft.values.shape[1] != hidden:
        raise AdapterMismatch(f"The soft prompt's embeddings have {soft.values.shape[1]} numbers, the model's {hidden}. Use its own base.")


class SoftPrompted(Backend):
    """`inner` must be able to compute from embeddings (`stage`) for a prompt, to take keys and values (`put`) for a prefix."""

    def __init__(self, inner: Any, soft: SoftPrompt) -> None:
        self._inner = inner
        num_own = soft.num_tokens // BLOCK_SIZE
        self.num_blocks = inner.num_blocks - num_own
        if self.num_blocks < 2:
            raise UnsupportedModel(
                f"The KV cache's {inner.num_blocks} blocks leave no room beside a soft prompt of {num_own}. Raise kv_cache_gb."
            )
        self._own = tuple(range(self.num_blocks, inner.num_blocks))
        self._shift = soft.num_tokens
        self.vocab_size, self.precision, self.lacks = inner.vocab_size, inner.precision, inner.lacks
        self._write(soft)

    @property
    def depth(self) -> int:
        return int(self._inner.depth)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        logits: Tensor = self._inner.forward([self._behind(piece) for piece in pieces])
        return logits

    def submit(self, pieces: Sequence[Piece]) -> object:
        return self._inner.submit([self._behind(piece) for piece in pieces])

    def collect(self, submitted: object) -> Tensor:
        logits: Tensor = self._inner.collect(submitted)
        return logits

    def watch(self, lost: Callable[[str], None]) -> None:
        self._inner.watch(lost)

    def load_adapter(self, name: str, path: Path) -> None:
        self._inner.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        self._inner.unload_adapter(name)

    def clear(self, blocks: Sequence[int]) -> None:
        self._inner.clear(blocks)

    def close(self) -> None:
        self._inner.close()

    def _behind(self, piece: Piece) -> Piece:
        return replace(piece, start=piece.start + self._shift, table=(*self._own, *piece.table))

    def _write(self, soft: SoftPrompt) -> None:
        piece = Piece(ids=(0,) * soft.num_tokens, start=0, table=self._own, num_logits=0)
        if soft.kind == "prompt":
            self._inner.stage([piece], soft.values)
        else:
            self._inner.put(piece, soft)
