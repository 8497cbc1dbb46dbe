"""The paged KV cache of the general backend, and where the tokens of a pass belong in it.

Shapes: N packed tokens, R decoding rows, L longest of them, K key heads, D head size, B blocks, C numbers of a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from r1ray.engine.backend import BLOCK_SIZE, Piece

__all__ = ["Layout", "PagedCache", "Rows", "num_blocks_of", "padded_table"]


@dataclass(slots=True)
class Rows:
    """Decoding rows [first, last) of a pass, gathered together: as long as the longest of them. `alike`: all are as long."""

    first: int
    last: int
    longest: int
    table_RB: Tensor
    position_R: Tensor
    alike: bool = False
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, L) true where a decoding token may look; None when it may look everywhere."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        if window is None and self.alike:
            return None
        position_R1 = self.position_R[:, None]
        key_L = torch.arange(self.longest, device=position_R1.device)
        mask_RL = key_L <= position_R1
        if window is not None:
            mask_RL &= key_L > position_R1 - window
        return mask_RL[:, None, None, :]


@dataclass(slots=True)
class Layout:
    """Where the packed tokens of one pass belong: the rows' first, then those of the `prompts`, whose blocks are in `tables`."""

    position_N: Tensor
    block_N: Tensor
    offset_N: Tensor
    rows: Sequence[Rows]
    num_rows: int
    prompts: Sequence[Piece] = ()
    tables: Sequence[Tensor] = ()
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Piece], device: torch.device, most_positions: int) -> Layout:
        """`pieces` has the decoding ones (one token each) first.

        At most `most_positions` positions of decoding rows are gathered at once, and one row always.
        """
        num_rows = next((i for i, piece in enumerate(pieces) if len(piece.ids) > 1), len(pieces))
        positions = [piece.start + i for piece in pieces for i in range(len(piece.ids))]
        blocks = [piece.table[(piece.start + i) // BLOCK_SIZE] for piece in pieces for i in range(len(piece.ids))]
        block_N, position_N = torch.tensor([blocks, positions], device=device).unbind()
        prompts = pieces[num_rows:]
        return cls(
            position_N=position_N,
            block_N=block_N,
            offset_N=position_N % BLOCK_SIZE,
            rows=[_rows(pieces, first, last, position_N) for first, last in _slices(pieces[:num_rows], most_positions)],
            num_rows=num_rows,
            prompts=prompts,
            tables=[torch.tensor(piece.table[: num_blocks_of(piece)], device=device) for piece in prompts],
        )

    @classmethod
    def of_rows(cls, position_R: Tensor, table_RB: Tensor) -> Layout:
        """Decoding rows alone, gathered to the end of their tables: nothing here depends on what is in the tensors."""
        num_rows, num_blocks = table_RB.shape
        return cls(
            position_N=position_R,
            block_N=table_RB.gather(1, (position_R // BLOCK_SIZE)[:, None])[:, 0],
            offset_N=position_R % BLOCK_SIZE,
            rows=[Rows(0, num_rows, num_blocks * BLOCK_SIZE, table_RB, position_R)],
            num_rows=num_rows,
        )

    def prompt_mask(self, index: int, window: int | None) -> Tensor | None:
        """(num, start + num) causal mask of a prompt's piece; None when it is the plain triangle."""
        if (index, window) not in self._masks:
            self._masks[index, window] = self._prompt_mask(self.prompts[index], window)
        return self._masks[index, window]

    def _prompt_mask(self, piece: Piece, window: int | None) -> Tensor | None:
        num, device = len(piece.ids), self.position_N.device
        if piece.start == 0 and (window is None or window >= num):
            return None
        query_n1 = torch.arange(piece.start, piece.start + num, device=device)[:, None]
        key_L = torch.arange(piece.start + num, device=device)
        mask = key_L <= query_n1
        return mask if window is None else mask & (key_L > query_n1 - window)


class PagedCache(Cache):
    """Keys and values of every layer: (num_blocks, BLOCK_SIZE, K, D) each.

    Positions come before heads, so that a gathered table is one row of positions. `latent` (DeepSeek's MLA): the model caches compressed
    latents, which all heads share, so there is one tensor (num_blocks, BLOCK_SIZE, 1, C) a layer: the latent, then the rotary part of the
    key. What a layer needs is known after a first pass, which takes a single block; then comes `allocate`.
    """

    def __init__(self, *, latent: bool, gather_bytes: int) -> None:
        super().__init__(layers=[])
        self.num_blocks = 1
        self.latent = latent
        self.gather_bytes = gather_bytes
        self.keys: dict[int, Tensor] = {}  # by the layer's number in the whole model
        self.values: dict[int, Tensor] = {}
        self.layout: Layout

    @property
    def bytes_per_block(self) -> int:
        """Over all layers of this process."""
        return sum(tensor[0].nbytes for tensor in self.tensors())

    def allocate(self, num_blocks: int) -> None:
        """Zeros: a masked NaN left in memory would still spoil the sum over values."""
        self.num_blocks = num_blocks
        for tensors in (self.keys, self.values):
            for layer, tensor in tensors.items():
                tensors[layer] = torch.zeros(num_blocks, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)

    def begin(self, pieces: Sequence[Piece], device: torch.device) -> Layout:
        """Every pass starts with this."""
        self.layout = Layout.of_pieces(pieces, device, self.most_positions)
        return self.layout

    def clear(self, blocks: Sequence[int]) -> None:
        for tensor in self.tensors():
            tensor[list(blocks)] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values, each (1, K, N, D), and hand them back: attention reads the cache itself."""
        if self.latent:
            self._store(self.keys, layer_idx, torch.cat((key_states, value_states), dim=-1))
        else:
            self._store(self.keys, layer_idx, key_states)
            self._store(self.values, layer_idx, value_states)
        return key_states, value_states

    def of_rows(self, layer_idx: int, rows: Rows) -> list[Tensor]:
        """Keys and values (R, K, L, D) of decoding rows; latents alone where the model has them."""
        return [cached[rows.table_RB].flatten(1, 2)[:, : rows.longest].transpose(1, 2) for cached in self._of(layer_idx)]

    def of_prompt(self, layer_idx: int, index: int) -> list[Tensor]:
        """The same, (1, K, start + num, D), of a prompt's piece."""
        table, end = self.layout.tables[index], _end(self.layout.prompts[index])
        return [cached[table].flatten(0, 1)[:end].transpose(0, 1)[None] for cached in self._of(layer_idx)]

    def _store(self, tensors: dict[int, Tensor], layer_idx: int, states: Tensor) -> None:
        if layer_idx not in tensors:
            tensors[layer_idx] = states.new_zeros(self.num_blocks, BLOCK_SIZE, states.shape[1], states.shape[3])
        tensors[layer_idx][self.layout.block_N, self.layout.offset_N] = states[0].transpose(0, 1)

    def _of(self, layer_idx: int) -> list[Tensor]:
        return [tensors[layer_idx] for tensors in (self.keys, self.values) if layer_idx in tensors]

    @property
    def most_positions(self) -> int:
        """Of decoding rows that are gathered at once."""
        return self.gather_bytes // self.position_bytes

    @property
    def position_bytes(self) -> int:
        """Of one position in the largest layer."""
        return max((sum(cached[0, 0].nbytes for cached in self._of(layer)) for layer in self.keys), default=1)

    def tensors(self) -> Iterator[Tensor]:
        """Of all layers."""
        yield from self.keys.values()
        yield from self.values.values()


def padded_table(piece: Piece, num_blocks: int) -> list[int]:
    """The blocks that a stream of such a length has, and its own first one for what is masked: another's may hold NaNs."""
    own = piece.table[:num_blocks]
    return [*own, *([piece.table[0]] * (num_blocks - len(own)))]


def num_blocks_of(piece: Piece) -> int:
    """That hold its tokens and all before them."""
    return _num_blocks(_end(piece))


def _rows(pieces: Sequence[Piece], first: int, last: int, position_N: Tensor) -> Rows:
    chosen = pieces[first:last]
    longest = max(_end(piece) for piece in chosen)
    tables = [padded_table(piece, _num_blocks(longest)) for piece in chosen]
    table_RB = torch.tensor(tables, dtype=torch.long, device=position_N.device)
    alike = all(_end(piece) == longest for piece in chosen)
    return Rows(first, last, longest, table_RB, position_N[first:last], alike)


def _slices(decoding: Sequence[Piece], most_positions: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows whose padded tables stay within so many positions."""
    first, longest = 0, 0
    for number, piece in enumerate(decoding):
        longer = max(longest, _num_blocks(_end(piece)) * BLOCK_SIZE)
        if number > first and (number + 1 - first) * longer > most_positions:
            yield first, number
            first, longer = number, _num_blocks(_end(piece)) * BLOCK_SIZE
        longest = longer
    if decoding:
        yield first, len(decoding)


def _end(piece: Piece) -> int:
    return piece.start + len(piece.ids)


def _num_blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)
