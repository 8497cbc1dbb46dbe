"""Decoding passes as one compiled graph of the whole model, in place of a call per operation.

`DecodeStep` is transformers' own model over the paged cache, captured by torch.export and compiled by Inductor; on CUDA the kernels of each
shape are one CUDA graph. A pass whose pieces are one token each is padded to a shape that was computed once at warm-up; padded rows
write into a block that no stream owns. Every other pass is not computed here. Takes pieces of streams; knows no requests and no adapters.

Shapes: R rows, B blocks of each, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1ray.engine.backend import BLOCK_SIZE, Piece
from r1ray.engine.pages import Layout, PagedCache, num_blocks_of, padded_table

__all__ = ["CompiledDecode", "Compiler", "DecodeShapes", "DecodeStep", "inductor", "is_wanted", "packed_rows"]

log = logging.getLogger(__name__)

LEAST_BLOCKS = 4  # 128 positions: less would save nothing
GRAPH_RUNS = 3  # a CUDA graph is warmed by the first, recorded by the second and played by the third
APART = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}  # mean of rows, by the norm of their logits; unlike ones: 1.4
Graph = Callable[[Tensor], Tensor]
Compiler = Callable[[torch.nn.Module, torch.device], Graph]

TRIAL_STD = 0.1  # of the cache in trials: of larger keys one position wins, and rounding decides which
EXTRA = 2  # columns before the table: the token, its position


def is_wanted(setting: bool | Literal["auto"], device: str) -> bool:
    """Whether engine.compile's `setting` compiles a model on `device`."""
    if isinstance(setting, bool):
        return setting
    is_cuda = device.startswith("cuda")
    log.info("compiled decode: %s", "yes (CUDA graphs)" if is_cuda else "no (on CPUs only with engine.compile=true)")
    return is_cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShapes:
    """The (rows, blocks) that passes are padded to: powers of two, and the largest of each.

    A shape gathers at most `most_positions`. `exact`: any shape within the largest one, unpadded, where one graph takes them all.
    """

    num_slots: int
    context: int
    most_positions: int
    exact: bool

    def fit(self, num_rows: int, num_blocks: int) -> tuple[int, int] | None:
        """The smallest shape that holds so many; None where there is none."""
        rows = next((size for size in self.rows if size >= num_rows), None)
        blocks = next((size for size in self.blocks if size >= num_blocks), None)
        if rows is None or blocks is None:
            return None
        shape = (num_rows, max(num_blocks, LEAST_BLOCKS)) if self.exact else (rows, blocks)
        return shape if self._is_within(*shape) else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """What must have been computed once: the largest first, since the memory of the others fits into its."""
        for num_rows in sorted({1, self.num_slots} if self.exact else self.rows, reverse=True):
            fitting = [size for size in reversed(self.blocks) if self._is_within(num_rows, size)]
            yield from ((num_rows, size) for size in fitting[: 1 if self.exact else None])

    @property
    def rows(self) -> tuple[int, ...]:
        return _doubles(1, self.num_slots)

    @property
    def blocks(self) -> tuple[int, ...]:
        return _doubles(LEAST_BLOCKS, max(LEAST_BLOCKS, -(-self.context // BLOCK_SIZE)))

    def _is_within(self, num_rows: int, num_blocks: int) -> bool:
        return num_rows * num_blocks * BLOCK_SIZE <= self.most_positions


def packed_rows(pieces: Sequence[Piece], shape: tuple[int, int], scratch: int) -> Tensor:
    """(R, 2 + B): each row's token, its position and its table; what is padded writes into block `scratch`."""
    num_rows, num_blocks = shape
    rows = [[piece.ids[0], piece.start, *padded_table(piece, num_blocks)] for piece in pieces]
    rows += [[0, 0, *([scratch] * num_blocks)]] * (num_rows - len(rows))
    return torch.tensor(rows)


class DecodeStep(torch.nn.Module):
    """(R, 2 + B) packed rows in, (R, V) logits out; writes the tokens' keys and values into the cache."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        super().__init__()
        self.model = model
        self._latent, self._gather_bytes = cache.latent, cache.gather_bytes
        self._keys = {layer: f"keys{layer}" for layer in cache.keys}
        self._values = {layer: f"values{layer}" for layer in cache.values}
        for names, tensors in ((self._keys, cache.keys), (self._values, cache.values)):
            for layer, name in names.items():
                self.register_buffer(name, tensors[layer])

    def forward(self, packed: Tensor) -> Tensor:
        ids_R, position_R, table_RB = packed[:, 0], packed[:, 1], packed[:, EXTRA:]
        cache = PagedCache(latent=self._latent, gather_bytes=self._gather_bytes)
        cache.keys = {layer: getattr(self, name) for layer, name in self._keys.items()}
        cache.values = {layer: getattr(self, name) for layer, name in self._values.items()}
        cache.layout = Layout.of_rows(position_R, table_RB)
        inputs: dict[str, Any] = {"input_ids": ids_R[None], "position_ids": position_R[None], "past_key_values": cache, "use_cache": True}
        logits: Tensor = self.model(**inputs, pages=cache).logits[0]
        return logits


class CompiledDecode:
    """The graphs of a model over `cache`, whose last block no stream owns, and the shapes they were warmed for."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, shapes: DecodeShapes, compiler: Compiler) -> None:
        self._compiler = compiler
        self._device = model.device
        self._cache = cache
        self._scratch = cache.num_blocks - 1
        self._shapes = shapes
        self._step = DecodeStep(model, cache)
        self._graphs: dict[bool, Graph] = {}  # of one row, of several
        self._warm: set[tuple[int, int]] = set()

    def logits(self, pieces: Sequence[Piece]) -> Tensor | None:
        """(W, V) of the pieces that want them; None where this pass must be computed in another way."""
        if not pieces or any(len(piece.ids) > 1 for piece in pieces):
            return None
        shape = self._shapes.fit(len(pieces), max(num_blocks_of(piece) for piece in pieces))
        if shape is None or not (self._shapes.exact or shape in self._warm):
            return None
        logits = self._run(pieces, shape)
        wanted = [number for number, piece in enumerate(pieces) if piece.num_logits]
        return logits[: len(pieces)] if len(wanted) == len(pieces) else logits[wanted]

    def warm_up(self, eager: Callable[[Sequence[Piece]], Tensor]) -> None:
        """Compile, and compute every shape once, against what `eager` gives for the same pieces. Overwrites the cache with zeros.

        Raises:
            Exception: whatever torch.export, Inductor or its C++ compiler cannot do with this model.
            ArithmeticError: a shape gives other logits.
        """
        started = time.perf_counter()
        for tensor in self._cache.tensors():
            tensor.normal_(std=TRIAL_STD)
        for shape in self._shapes:
            pieces = self._trial(shape)
            right = eager(pieces)
            self._compare(shape, self._played(pieces, shape), right)
            self._warm.add(shape)
        for tensor in self._cache.tensors():
            tensor.zero_()
        log.info("compiled decode: %d shapes are warm after %.1f s", len(self._warm), time.perf_counter() - started)

    def _played(self, pieces: Sequence[Piece], shape: tuple[int, int]) -> Tensor:
        """Its logits when nothing is left to compile or to record."""
        is_many = shape[0] > 1
        if is_many not in self._graphs:
            log.info("compiled decode: compiling for %s", "several streams" if is_many else "one stream")
            self._graphs[is_many] = self._compiled(is_many=is_many)
        for _ in range(GRAPH_RUNS - 1 if self._is_cuda else 0):
            self._run(pieces, shape)
        return self._run(pieces, shape)[: len(pieces)]

    def _compare(self, shape: tuple[int, int], found: Tensor, right: Tensor) -> None:
        found, right = found.float(), right.float()
        apart = float(((found - right).norm(dim=-1) / right.norm(dim=-1)).mean())
        if not apart <= APART.get(self._step.model.dtype, 0.0):  # also where one of them is no number
            raise ArithmeticError(f"its logits for {shape[0]} rows of {shape[1]} blocks are {apart:.1e} from the eager ones")

    def _trial(self, shape: tuple[int, int]) -> list[Piece]:
        """Rows that fill a shape, but for one where it pads; each writes where no other does."""
        num_rows, num_blocks = shape
        num_rows -= not self._shapes.exact and num_rows > 2
        room = self._cache.num_blocks - 1
        first = (num_blocks - 1) * BLOCK_SIZE
        tables = [[*((row + i) % room for i in range(1, num_blocks)), row // BLOCK_SIZE % room] for row in range(num_rows)]
        return [Piece(ids=[row], start=first + row % BLOCK_SIZE, table=table, num_logits=1) for row, table in enumerate(tables)]

    def _compiled(self, *, is_many: bool) -> Graph:
        """For any number of blocks, and of rows where they are many: torch.export takes a dimension of one for a fixed one."""
        shape = max(3, self._shapes.num_slots) if is_many else 1, self._shapes.blocks[-1]
        shape = shape[0], shape[1] + (shape[0] == shape[1] + EXTRA)  # equal dimensions would be taken for one
        example = packed_rows([], shape, self._scratch).to(self._device)
        changing = {0: torch.export.Dim.DYNAMIC} if is_many else {}
        with torch.no_grad():
            program = torch.export.export(self._step, (example,), dynamic_shapes=({**changing, 1: torch.export.Dim.DYNAMIC},), strict=False)
        graph = self._compiler(program.module(), self._device)
        graph(example)
        return graph

    def _run(self, pieces: Sequence[Piece], shape: tuple[int, int]) -> Tensor:
        packed = packed_rows(pieces, shape, self._scratch).to(self._device)
        if not self._is_cuda:
            return self._graphs[shape[0] > 1](packed)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._graphs[shape[0] > 1](packed).clone()  # the next replay writes there again

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"


def inductor(module: torch.nn.Module, device: torch.device) -> Graph:
    """A captured graph compiled for shapes of any size, on CUDA with a CUDA graph for each that is met."""
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # its weights and its cache never change
    if device.type == "cuda":
        options |= {"triton.cudagraphs": True, "triton.cudagraph_dynamic_shape_warn_limit": None}
    graph: Graph = torch.compile(module, dynamic=True, fullgraph=True, options=options)
    return graph


def _doubles(least: int, most: int) -> tuple[int, ...]:
    """`least` and its doubles below `most`, then `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return (*sizes, most)
