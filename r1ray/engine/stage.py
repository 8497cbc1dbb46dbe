"""One process of a split model: its part of some layers and of their KV cache, and the loop that computes what arrives.

Stages split the model by layers; the tensor ranks of a stage split each of its layers. The passes come as one row of integers over the
link that carries the states, so that a step needs no call through Ray; Ray starts the processes, loads them and sees them die. Knows no
scheduler: passes are computed in the order they arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from r1ray.engine.backend import Piece
from r1ray.engine.link import Line, Link, Place, StatesForm
from r1ray.engine.memory import CacheWish, Room
from r1ray.engine.tensor import Share
from r1ray.errors import EngineStopped
from r1ray.model.architecture import read_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Layers", "StageOrder", "decode_pass", "encode_pass", "load_stage", "orders_by_rank", "serve_passes"]

PASS, CLEAR, END = 1, 2, 0


class Layers(Protocol):
    """What computes a stage."""

    vocab_size: int
    precision: str

    def room(self, wish: CacheWish) -> Room:
        """What is left beside the weights. The tensor ranks of a stage ask at the same time."""

    def allocate(self, num_blocks: int) -> None:
        """The KV cache, once, before the first pass."""

    def stage(self, pieces: Sequence[Piece], hidden: Tensor | None) -> Tensor:
        """(tokens, hidden) states in, None at the first stage; the same out, logits at the last."""

    def clear(self, blocks: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """All that a process must know to load its layers; small, since it travels to another node."""

    directory: Path
    adapter: Path | None
    layers: tuple[int, int]
    precision: str
    native: bool
    wish: CacheWish
    num_threads: int
    device: str = "cpu"
    place: Place = field(default_factory=Place)

    def states(self, hidden: int) -> StatesForm:
        """How the stages hand on what they compute: the compiled kernels in float32, transformers' modules as they have it."""
        return StatesForm(hidden=hidden, dtype=torch.float32 if self.native else getattr(torch, self.precision), device=self.device)


def orders_by_rank(order: StageOrder, ranges: Sequence[tuple[int, int]], num_tensor: int) -> list[StageOrder]:
    """One for each of `num_tensor` ranks of each of the stages whose layers are `ranges`."""
    orders = [
        replace(order, layers=layers, place=Place(stage=stage, num_stages=len(ranges), tensor=tensor, num_tensor=num_tensor))
        for stage, layers in enumerate(ranges)
        for tensor in range(num_tensor)
    ]
    return sorted(orders, key=lambda order: order.place.rank)


def load_stage(order: StageOrder, share: Share) -> Layers:
    """Read the tensors of these layers only, and of each tensor `share`'s part only."""
    if order.native:
        assert share.size == 1, "the compiled kernels compute whole layers"
        return _native(order, read_architecture(order.directory))
    from transformers import AutoConfig

    return _transformers(order, AutoConfig.from_pretrained(order.directory), share)


def _native(order: StageOrder, config: PretrainedConfig) -> Layers:
    from r1ray.engine.native.model import NativeModel, NativeOptions
    from r1ray.model.checkpoint import checkpoint_tensors
    from r1ray.model.lora import merged, read_lora

    options = NativeOptions(
        precision=order.precision,  # type: ignore[arg-type]
        context=order.wish.context,
        num_threads=order.num_threads,
        layers=order.layers,
    )
    tensors = checkpoint_tensors(order.directory)
    return NativeModel(config, merged(tensors, read_lora(order.adapter)) if order.adapter else tensors, options)


def _transformers(order: StageOrder, config: PretrainedConfig, share: Share) -> Layers:
    from r1ray.engine.paged import TransformersBackend
    from r1ray.engine.partial import load_layers

    torch.set_num_threads(order.num_threads)
    model = load_layers(order.directory, config, getattr(torch, order.precision), order.layers, share)
    return TransformersBackend(model.to(torch.device(order.device)))


def encode_pass(pieces: Sequence[Piece]) -> list[int]:
    """`PASS`, the number of pieces, four numbers for each, then their ids and tables."""
    row = [PASS, len(pieces)]
    for piece in pieces:
        row += [piece.start, len(piece.ids), len(piece.table), piece.num_logits]
    for piece in pieces:
        row += [*piece.ids, *piece.table]
    return row


def decode_pass(row: Sequence[int]) -> list[Piece]:
    num = row[1]
    at = 2 + 4 * num
    pieces = []
    for start, num_ids, num_blocks, num_logits in zip(*(row[2 + i : at : 4] for i in range(4)), strict=True):
        ids, table = row[at : at + num_ids], row[at + num_ids : at + num_ids + num_blocks]
        pieces.append(Piece(ids=ids, start=start, table=table, num_logits=num_logits))
        at += num_ids + num_blocks
    return pieces


@torch.inference_mode()
def serve_passes(layers: Layers, link: Link, line: Line, rank: int) -> None:
    """Compute what rank 0 sends until it ends. The last stage's results are rank 0's alone to use: other ranks of it drop theirs.

    Raises:
        EngineStopped: a neighbour is gone.
    """
    while True:
        try:
            row = link.receive_row(0)
        except RuntimeError as error:
            raise EngineStopped(f"Rank {rank} of the pipeline lost its driver: {error}.") from error
        if row[0] == END:
            return
        if row[0] == CLEAR:
            layers.clear(row[1:])
            continue
        pieces = decode_pass(row)
        line.send(layers.stage(pieces, line.receive(sum(len(piece.ids) for piece in pieces))))
