"""One process of a split model: its part of some layers, of their KV cache, and the links to the others.

Stages split the model by layers; the tensor ranks of a stage split each of its layers. The passes come as one row of integers over the same
links as the activations, so that a step needs no call through Ray; Ray starts the processes, loads them and sees them die. Knows no
scheduler: passes are computed in the order they arrive.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from r1ray.engine.backend import Piece
from r1ray.engine.memory import CacheWish, Room
from r1ray.engine.tensor import Share
from r1ray.errors import EngineStopped
from r1ray.model.architecture import read_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Layers", "Link", "Place", "StageOrder", "decode_pass", "encode_pass", "load_stage", "orders_by_rank", "serve_passes"]

log = logging.getLogger(__name__)

PASS, CLEAR, END = 1, 2, 0
ROW = 1024  # integers in the first message of a row: a step of 32 short streams fits
CAUSE = "cause"  # in the store: why the first rank that failed did
POLL = timedelta(seconds=1)
FOR_EVER = timedelta(days=365)  # an idle engine sends nothing; a dead one closes the connection


class Layers(Protocol):
    """What computes a stage."""

    vocab_size: int
    precision: str

    def room(self, wish: CacheWish) -> Room:
        """What is left beside the weights. The tensor ranks of a stage ask at the same time."""

    def allocate(self, num_blocks: int) -> None:
        """The KV cache, once, before the first pass."""

    def stage(self, pieces: Sequence[Piece], hidden: Tensor | None) -> Tensor:
        """(tokens, hidden) float states in, None at the first stage; the same out, logits at the last."""

    def clear(self, blocks: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which process of the world this is: tensor rank `tensor` of stage `stage`.

    Rank 0, the driver, is the last stage's first, since logits become tokens there; the other ranks of its stage follow, then the first
    stage's and so on. States go from a rank to the same tensor rank of the next stage: all ranks of a stage have the same.
    """

    stage: int = 0
    num_stages: int = 1
    tensor: int = 0
    num_tensor: int = 1

    @property
    def bundle(self) -> int:
        """Of the placement group: one per stage, the driver's first."""
        return (self.stage + 1) % self.num_stages

    @property
    def rank(self) -> int:
        return self.bundle * self.num_tensor + self.tensor

    @property
    def world(self) -> int:
        return self.num_stages * self.num_tensor

    @property
    def before(self) -> int | None:
        """The rank that hands states to this one; None at the first stage."""
        return replace(self, stage=self.stage - 1).rank if self.stage else None

    @property
    def after(self) -> int | None:
        """The rank that takes this one's states; None at the last stage."""
        return replace(self, stage=self.stage + 1).rank if self.stage < self.num_stages - 1 else None


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


class Link:
    """Messages between the processes of one model, over gloo, and the groups that add up. Its own: the process may have others."""

    def __init__(self, address: str, port: int, place: Place, *, timeout_s: float) -> None:
        torch_distributed: Any = dist  # its stubs lack what follows
        self._timeout = timedelta(seconds=timeout_s)
        is_master = place.rank == 0
        store = torch_distributed.TCPStore(address, port, place.world, is_master, timeout=self._timeout, wait_for_workers=False)
        self._store = store  # the connection dies with it
        self._place = place
        self._address = _own_address(address, port)
        self._group = self._gloo(store, place.rank, place.world)
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Returns at once; keeps what is on its way."""
        self._sending = [entry for entry in self._sending if not entry[0].is_completed()]
        self._sending.append((self._group.send([tensor], to, 0), tensor))

    def receive(self, tensor: Tensor, source: int, *, within: timedelta | None = None) -> Tensor:
        """Fill `tensor`; RuntimeError when the other end dies or nothing comes in time."""
        self._group.recv([tensor], source, 0).wait(within or self._timeout)
        return tensor

    def send_row(self, numbers: Sequence[int], to: int) -> None:
        """A row of integers of any length: its length and beginning in one message, and what does not fit there in another."""
        first = torch.zeros(ROW, dtype=torch.int32)
        row = torch.tensor([len(numbers), *numbers], dtype=torch.int32)
        first[: len(row)] = row[:ROW]
        self.send(first, to)
        if len(row) > ROW:
            self.send(row[ROW:].clone(), to)

    def receive_row(self, source: int) -> list[int]:
        """Waits for it as long as the other end lives."""
        first = self.receive(torch.empty(ROW, dtype=torch.int32), source, within=FOR_EVER)
        num = int(first[0])
        row: list[int] = first[1 : num + 1].tolist()
        if rest := num - len(row):
            row += self.receive(torch.empty(rest, dtype=torch.int32), source).tolist()
        return row

    def exchange(self, room: Room) -> list[Room]:
        """What every rank has left, this one's `room` included. All of them must ask for it.

        Raises:
            EngineStopped: one of them failed, with its cause, or gave none in time.
        """
        self._store.set(f"room{self._place.rank}", json.dumps(asdict(room)))
        return [Room(**json.loads(self._awaited(f"room{rank}"))) for rank in range(self._place.world)]

    def blame(self, cause: str) -> None:
        """Tell the driver why this rank fails; the first one is right, since its neighbours then fail for want of it."""
        try:
            self._store.compare_set(CAUSE, "", cause)
        except RuntimeError as error:
            log.info("the store of the pipeline cannot be told: %s", error)

    def cause(self) -> str:
        """What a rank that failed has told; empty when it could not."""
        try:
            return str(self._store.get(CAUSE).decode()) if self._store.check([CAUSE]) else ""
        except RuntimeError as error:
            log.info("the store of the pipeline cannot be asked: %s", error)
            return ""

    def _awaited(self, key: str) -> bytes:
        deadline = time.monotonic() + self._timeout.total_seconds()
        while time.monotonic() < deadline:
            try:
                self._store.wait([key], POLL)
                found: bytes = self._store.get(key)
                return found
            except dist.DistStoreError as error:  # not there yet
                if cause := self.cause():
                    raise EngineStopped(cause) from error
        raise EngineStopped(f"A rank of the pipeline said nothing of its memory within {self._timeout}.")

    def tensor_group(self, device: str) -> Any:
        """The ranks of this one's stage: over NCCL where each has a GPU of its own, else over gloo. All of them must ask for it."""
        place = self._place
        torch_distributed: Any = dist
        store = torch_distributed.PrefixStore(f"stage{place.stage}", self._store)
        if not device.startswith("cuda") or not _have_own_gpus(store, place, device):
            return self._gloo(store, place.tensor, place.num_tensor)
        options = torch_distributed.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return torch_distributed.ProcessGroupNCCL(store, place.tensor, place.num_tensor, options)

    def _gloo(self, store: Any, rank: int, size: int) -> Any:
        torch_distributed: Any = dist
        gloo = torch_distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address)]
        options._timeout = self._timeout
        return gloo(store, rank, size, options)


def _own_address(address: str, port: int) -> str:
    """This machine's address on the way to the first stage: gloo would otherwise ask the host name, which may resolve to anything."""
    import socket

    with socket.create_connection((address, port), timeout=10) as probe:
        own: str = probe.getsockname()[0]
        return own


def _have_own_gpus(store: Any, place: Place, device: str) -> bool:
    """NCCL refuses two ranks on one GPU, which fractions of `stage_gpus` put there."""
    store.set(f"gpu{place.tensor}", str(torch.cuda.get_device_properties(torch.device(device)).uuid))
    num_gpus = len({store.get(f"gpu{rank}") for rank in range(place.num_tensor)})
    if num_gpus < place.num_tensor:
        log.info("tensor parallel: gloo through main memory (%d ranks on %d GPUs; NCCL wants one each)", place.num_tensor, num_gpus)
    return num_gpus == place.num_tensor


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
def serve_passes(layers: Layers, link: Link, place: Place, hidden: int) -> None:
    """Compute what rank 0 sends until it ends. The last stage's results are rank 0's alone to use: other ranks of it drop theirs.

    Raises:
        EngineStopped: a neighbour is gone.
    """
    while True:
        try:
            row = link.receive_row(0)
        except RuntimeError as error:
            raise EngineStopped(f"Rank {place.rank} of the pipeline lost its driver: {error}.") from error
        if row[0] == END:
            return
        if row[0] == CLEAR:
            layers.clear(row[1:])
            continue
        pieces = decode_pass(row)
        states = layers.stage(pieces, _states(link, place, sum(len(piece.ids) for piece in pieces), hidden))
        if place.after is not None:
            link.send(states.float().cpu().contiguous(), place.after)


def _states(link: Link, place: Place, num_tokens: int, hidden: int) -> Tensor | None:
    if place.before is None:
        return None
    try:
        return link.receive(torch.empty(num_tokens, hidden), place.before)
    except RuntimeError as error:
        raise EngineStopped(f"Rank {place.rank} of the pipeline lost rank {place.before}: {error}.") from error
