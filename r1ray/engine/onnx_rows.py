"""The KV cache of the ONNX backend: blocks that last, and rows that a graph can read.

ONNX Runtime's attention on CPUs (GroupQueryAttention) wants each stream's keys and values in one piece, batched along rows; the engine
hands out blocks of 32 positions. So the truth lies in blocks, and each running stream has a row beside them that is read and written in
place. What a pass wrote into rows is copied into blocks at once; a row that someone else took is filled again out of blocks. That makes
shared prefixes and preemption work as everywhere, for twice the memory. Knows no graph.

P planes (keys and values of every layer), K heads, S positions of a row, D numbers per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from r1ray.engine.backend import BLOCK_SIZE, Piece

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rows"]

FIRST_LENGTH = 256  # positions of a row at the start; doubled when a stream outgrows it


@dataclass(slots=True)
class Row:
    """Whose keys and values lie here: those of the first `length` positions of the blocks `table`. `used` is the pass that saw it last."""

    table: tuple[int, ...] = ()
    length: int = 0
    used: int = -1

    def forget(self) -> None:
        self.table, self.length = (), 0


class Rows:
    """`num_rows` streams at most may be in one pass. `shape` is (P, K, D)."""

    def __init__(self, shape: tuple[int, int, int], *, num_blocks: int, num_rows: int, context: int, kind: tuple[torch.dtype, str]) -> None:
        self._shape = shape
        self._dtype, self._device = kind
        self._context = context
        planes, heads, width = shape
        self._blocks = torch.zeros(num_blocks, planes, heads, BLOCK_SIZE, width, dtype=self._dtype, device=self._device)
        self._rows = [Row() for _ in range(num_rows)]
        self._pass = 0
        self.generation = 0  # another one: the tensor moved
        self._allocate(min(FIRST_LENGTH, context))

    @property
    def length(self) -> int:
        """S."""
        return self.tensor.shape[3]

    def plane(self, plane: int, first: int) -> Tensor:
        """(K, S, D) of row `first`; those of the next row follow it in memory."""
        return self.tensor[plane, first]

    def place(self, pieces: Sequence[Piece]) -> list[int]:
        """The row of each piece, holding everything before it; pieces of one token (decoding streams) get the rows 0, 1, ... among them."""
        self._pass += 1
        if (longest := max(piece.start + len(piece.ids) for piece in pieces)) > self.length:
            self._allocate(min(self._context, max(longest, 2 * self.length)))
        places = self._found(pieces)
        for number, piece in enumerate(pieces):
            if number not in places:
                places[number] = self._take(set(places.values()))
                self._fill(places[number], piece)
        self._gather([number for number, piece in enumerate(pieces) if len(piece.ids) == 1], places)
        for number, row in places.items():
            self._begin(row, pieces[number])
        return [places[number] for number in range(len(pieces))]

    def keep(self, pieces: Sequence[Piece], places: Sequence[int]) -> None:
        """Copy what a pass has written into the pieces' blocks."""
        singles = [(piece, row) for piece, row in zip(pieces, places, strict=True) if len(piece.ids) == 1]
        if singles:
            at = torch.tensor([[piece.table[piece.start // BLOCK_SIZE], piece.start, row] for piece, row in singles], device=self._device)
            block_N, position_N, row_N = at.unbind(1)
            self._blocks[block_N, :, :, position_N % BLOCK_SIZE] = self.tensor[:, row_N, :, position_N]
        for piece, row in zip(pieces, places, strict=True):
            if len(piece.ids) > 1:
                for block, offset, begin, end in _parts(piece.table, piece.start, piece.start + len(piece.ids)):
                    self._blocks[block, :, :, offset : offset + end - begin] = self.tensor[:, row, :, begin:end]

    def clear(self, blocks: Sequence[int]) -> None:
        """Overwrite the blocks and every row that holds one of them."""
        self._blocks[list(blocks)] = 0
        for number, row in enumerate(self._rows):
            if not set(blocks).isdisjoint(row.table):
                self.tensor[:, number] = 0
                row.forget()

    def _allocate(self, length: int) -> None:
        """Rows of another length, empty: the streams' are filled again out of blocks. Pages that nobody writes take no memory."""
        planes, heads, width = self._shape
        self.tensor = torch.zeros(planes, len(self._rows), heads, length, width, dtype=self._dtype, device=self._device)
        self.generation += 1
        for row in self._rows:
            row.forget()

    def _found(self, pieces: Sequence[Piece]) -> dict[int, int]:
        """Piece -> the row that holds exactly what is before it."""
        known = {(row.length, row.table): number for number, row in enumerate(self._rows) if row.length}
        found = {}
        for number, piece in enumerate(pieces):
            row = known.pop((piece.start, tuple(piece.table[: _num_blocks(piece.start)])), None)  # popped: two may begin alike
            if row is not None:
                found[number] = row
        return found

    def _take(self, taken: set[int]) -> int:
        """The first row that the pass before did not see, so that rows stay dense; else that of the stream seen longest ago."""
        free = [number for number in range(len(self._rows)) if number not in taken]
        return min(free, key=lambda number: (max(self._rows[number].used, self._pass - 2), number))

    def _fill(self, number: int, piece: Piece) -> None:
        for block, offset, begin, end in _parts(piece.table, 0, piece.start):
            self.tensor[:, number, :, begin:end] = self._blocks[block, :, :, offset : offset + end - begin]
        self._rows[number].table = tuple(piece.table[: _num_blocks(piece.start)])
        self._rows[number].length = piece.start

    def _gather(self, decoding: Sequence[int], places: dict[int, int]) -> None:
        """Move rows until the decoding pieces have the first ones. Who is moved out of the way and is in the pass changes places."""
        holders = {row: number for number, row in places.items()}
        high = [number for number in decoding if places[number] >= len(decoding)]
        low = [row for row in range(len(decoding)) if holders.get(row) not in decoding]
        for number, target in zip(high, low, strict=True):
            source = places[number]
            self._swap(source, target, both=target in holders)
            places[number] = target
            if target in holders:
                places[holders[target]] = source

    def _swap(self, source: int, target: int, *, both: bool) -> None:
        rows, tensor = self._rows, self.tensor
        old = tensor[:, target, :, : rows[target].length].clone() if both else None
        tensor[:, target, :, : rows[source].length] = tensor[:, source, :, : rows[source].length]
        if old is None:
            rows[target].forget()
        else:
            tensor[:, source, :, : rows[target].length] = old
        rows[source], rows[target] = rows[target], rows[source]

    def _begin(self, number: int, piece: Piece) -> None:
        """The row will hold the piece too. Blocks that it is the first to write into are nobody else's any more."""
        end = piece.start + len(piece.ids)
        fresh = piece.table[_num_blocks(piece.start) : _num_blocks(end)]
        if fresh:
            for row in self._rows:
                if not set(fresh).isdisjoint(row.table):
                    row.forget()
        row = self._rows[number]
        row.table, row.length, row.used = tuple(piece.table[: _num_blocks(end)]), end, self._pass


def _num_blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


def _parts(table: Sequence[int], start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Positions [start, end) by block: (block, offset in it, begin, end)."""
    firsts = [start, *range((start // BLOCK_SIZE + 1) * BLOCK_SIZE, end, BLOCK_SIZE)] if start < end else []
    return [(table[first // BLOCK_SIZE], first % BLOCK_SIZE, first, min(end, (first // BLOCK_SIZE + 1) * BLOCK_SIZE)) for first in firsts]
