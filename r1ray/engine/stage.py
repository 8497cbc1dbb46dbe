"""One stage of a pipeline: some layers, their part of the KV cache, and the links to the neighbours.

The passes come as one row of integers over the same links as the activations, so that a step needs no call through Ray; Ray starts the
stages, loads them and sees them die. Knows no scheduler: passes are computed in the order they arrive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from r1ray.engine.backend import Piece
from r1ray.errors import EngineStopped
from r1ray.model.architecture import read_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Layers", "Link", "StageOrder", "decode_pass", "encode_pass", "load_stage", "serve_passes"]

log = logging.getLogger(__name__)

PASS, CLEAR, END = 1, 2, 0


class Layers(Protocol):
    """What computes a stage."""

    vocab_size: int
    precision: str

    def stage(self, pieces: Sequence[Piece], hidden: Tensor | None) -> Tensor:
        """(tokens, hidden) float states in, None at the first stage; the same out, logits at the last."""

    def clear(self, blocks: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """All that a stage must know to load its layers; small, since it travels to another node."""

    directory: Path
    adapter: Path | None
    layers: tuple[int, int]
    precision: str
    native: bool
    num_blocks: int
    context: int
    num_threads: int
    device: str = "cpu"


def load_stage(order: StageOrder) -> Layers:
    """Read the tensors of these layers only."""
    if order.native:
        return _native(order, read_architecture(order.directory))
    from transformers import AutoConfig

    return _transformers(order, AutoConfig.from_pretrained(order.directory))


def _native(order: StageOrder, config: PretrainedConfig) -> Layers:
    from r1ray.engine.native.model import NativeModel, NativeOptions
    from r1ray.model.checkpoint import checkpoint_tensors
    from r1ray.model.lora import merged, read_lora

    options = NativeOptions(
        precision=order.precision,  # type: ignore[arg-type]
        num_blocks=order.num_blocks,
        context=order.context,
        num_threads=order.num_threads,
        layers=order.layers,
    )
    tensors = checkpoint_tensors(order.directory)
    return NativeModel(config, merged(tensors, read_lora(order.adapter)) if order.adapter else tensors, options)


def _transformers(order: StageOrder, config: PretrainedConfig) -> Layers:
    from r1ray.engine.paged import TransformersBackend
    from r1ray.engine.partial import load_layers

    torch.set_num_threads(order.num_threads)
    model = load_layers(order.directory, config, getattr(torch, order.precision), order.layers).to(torch.device(order.device))
    return TransformersBackend(model, num_blocks=order.num_blocks)


class Link:
    """Point-to-point messages between the ranks of one pipeline, over gloo. A group of its own: the process may have others."""

    def __init__(self, address: str, port: int, rank: int, world: int, *, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        torch_distributed: Any = dist  # its stubs lack what follows
        gloo = torch_distributed.ProcessGroupGloo
        store = torch_distributed.TCPStore(address, port, world, rank == 0, timeout=timeout, wait_for_workers=False)
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=_own_address(address, port))]
        options._timeout = timeout
        self._group: Any = gloo(store, rank, world, options)
        self._store = store  # the connection dies with it
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Returns at once; keeps what is on its way."""
        self._sending = [entry for entry in self._sending if not entry[0].is_completed()]
        self._sending.append((self._group.send([tensor], to, 0), tensor))

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill `tensor`; RuntimeError when the other end dies or nothing comes in time."""
        self._group.recv([tensor], source, 0).wait()
        return tensor

    def send_row(self, numbers: Sequence[int], to: int) -> None:
        """A row of integers of any length."""
        self.send(torch.tensor([len(numbers)], dtype=torch.int32), to)
        self.send(torch.tensor(numbers, dtype=torch.int32), to)

    def receive_row(self, source: int) -> list[int]:
        length = int(self.receive(torch.empty(1, dtype=torch.int32), source))
        return self.receive(torch.empty(length, dtype=torch.int32), source).tolist()


def _own_address(address: str, port: int) -> str:
    """This machine's address on the way to the first stage: gloo would otherwise ask the host name, which may resolve to anything."""
    import socket

    with socket.create_connection((address, port), timeout=10) as probe:
        own: str = probe.getsockname()[0]
        return own


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
def serve_passes(layers: Layers, link: Link, rank: int, world: int, hidden: int) -> None:
    """Compute what rank 0 sends until it ends; rank 0 has the last stage, rank 1 the first, each hands on to the next.

    Raises:
        EngineStopped: a neighbour is gone.
    """
    while True:
        try:
            row = link.receive_row(0)
        except RuntimeError as error:
            raise EngineStopped(f"Stage {rank} of the pipeline lost its driver: {error}.") from error
        if row[0] == END:
            return
        if row[0] == CLEAR:
            layers.clear(row[1:])
            continue
        pieces = decode_pass(row)
        before = None
        if rank > 1:
            before = link.receive(torch.empty(sum(len(piece.ids) for piece in pieces), hidden), rank - 1)
        link.send(layers.stage(pieces, before).float().cpu().contiguous(), (rank + 1) % world)
