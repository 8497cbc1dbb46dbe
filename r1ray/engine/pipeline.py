"""A model over several processes or nodes: a backend whose layers are split into stages, and each stage's layers over tensor ranks.

The driver (this process, rank 0) is in the last stage, where logits become tokens; workers are the other ranks, each with its own part of
the layers and of the KV cache. As many passes are under way as there are stages, each of other streams, so that the stages work
at the same time; stages that want the same cores take turns instead. The cache is sized when all have loaded, by what the fullest of them
has left. A worker that dies fails the engine at once, busy or idle, with its cause: the replica is rebuilt as one unit. Knows not what
runs the workers (`actors`: Ray).
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r1ray.engine.backend import OUT_OF_MEMORY, Piece
from r1ray.engine.link import Line, Link
from r1ray.engine.memory import blocks_for
from r1ray.engine.stage import CLEAR, END, Layers, StageOrder, encode_pass, load_stage, serve_passes
from r1ray.engine.tensor import RANK_GONE, Share
from r1ray.errors import AdapterMismatch, EngineStopped

__all__ = ["Host", "PipelineBackend", "Worker", "Workers", "passes_at_once"]

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 300.0  # of a rank for one pass: a dead one is noticed at once, this is for one that hangs
GONE = "A stage of the pipeline is gone."


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where a rank is: Ray's node, and the machine's address and physical cores. Nodes of a local test cluster share a machine."""

    node: str
    address: str
    num_cores: int


class Worker:
    """One rank: loads at once, agrees with the others on the cache's size, then computes until the driver ends."""

    def __init__(self, order: StageOrder) -> None:
        self._order = order
        self._share = Share(order.place.tensor, order.place.num_tensor)
        self.layers: Layers = load_stage(order, self._share)
        self.num_blocks = 0
        self.line: Line

    def connect(self, address: str, port: int, hidden: int) -> Link:
        """All ranks at the same time: each waits for the others, then for what they have left beside their weights.

        Raises:
            EngineStopped: another one failed; says why.
        """
        place = self._order.place
        link = Link(address, port, place, timeout_s=ANSWER_TIMEOUT_S)
        with self._blamed(link):
            if place.num_tensor > 1:
                self._share.join(link.tensor_group(self._order.device))
            self.line = link.line(self._order.states(hidden))
            rooms = link.exchange(self.layers.room(self._order.wish))
            self.num_blocks = blocks_for(rooms, self._order.wish)
            self.layers.allocate(self.num_blocks)
        return link

    def compute(self, address: str, port: int, hidden: int) -> None:
        """Raises EngineStopped when another rank is gone; whatever else fails here, the driver is told first."""
        link = self.connect(address, port, hidden)
        with self._blamed(link):
            serve_passes(self.layers, link, self.line, self._order.place.rank)

    @contextmanager
    def _blamed(self, link: Link) -> Iterator[None]:
        try:
            yield
        except EngineStopped:
            raise
        except Exception as error:
            first, last = self._order.layers
            link.blame(f"Rank {self._order.place.rank} (layers {first}-{last - 1}): {type(error).__name__}: {error}")
            raise


class Workers(Protocol):
    """What runs the ranks but the first."""

    def start(self, orders: Sequence[StageOrder]) -> None:
        """A Worker for each order, all at the same time."""

    def wait(self) -> list[Host]:
        """Until all have loaded; this process' host, then theirs. Raises EngineStopped when one cannot."""

    def compute(self, address: str, port: int, hidden: int) -> None:
        """Let all connect to the driver there and compute, and return at once."""

    def wait_for_end(self) -> None:
        """Until one of them has ended, whatever ended it."""

    def kill(self) -> None: ...


class PipelineBackend:
    """`orders` are in the order of their ranks: the first is loaded here, the others by `workers`."""

    def __init__(self, orders: Sequence[StageOrder], *, hidden: int, workers: Workers) -> None:
        self.lacks = frozenset({"adapters"})
        self._place = orders[0].place
        self._under_way: deque[list[Piece]] = deque()
        self._workers = workers
        workers.start(orders[1:])
        try:
            own = Worker(orders[0])
            self.hosts = workers.wait()
            address, port = self.hosts[0].address, _free_port()
            workers.compute(address, port, hidden)
            self._link = own.connect(address, port, hidden)
        except Exception:
            workers.kill()
            raise
        self.depth = passes_at_once(orders[0], self.hosts)
        log.info("pipeline: %d stages, %d passes at once", self._place.num_stages, self.depth)
        self._layers, self._line, self.num_blocks = own.layers, own.line, own.num_blocks
        self.vocab_size = self._layers.vocab_size
        self.precision = self._layers.precision

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        return self.collect(self.submit(pieces))

    def submit(self, pieces: Sequence[Piece]) -> object:
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number].ids) > 1)  # the general backend wants decoding rows first
        ordered = [replace(pieces[number], adapter=None) for number in order]
        self._tell(encode_pass(ordered))
        self._under_way.append(ordered)
        return order

    def collect(self, submitted: object) -> Tensor:
        pieces = self._under_way.popleft()
        logits = self._stage(pieces)
        rows = torch.split(logits, [piece.num_logits for piece in pieces])
        assert isinstance(submitted, list), "as submit gave it"
        return torch.cat([rows[submitted.index(number)] for number in range(len(rows))])

    def watch(self, lost: Callable[[str], None]) -> None:
        def wait() -> None:
            self._workers.wait_for_end()
            lost(self._gone())  # of no effect where the engine ended it
            self._link.abort()  # its own thread may wait for a GPU that waits for the dead one

        threading.Thread(target=wait, name="r1ray-stages", daemon=True).start()

    def load_adapter(self, name: str, path: Path) -> None:
        raise AdapterMismatch(
            f"A model split over {self._place.world} processes is served merged; adapter {name} at {path} cannot be put beside it."
        )

    def unload_adapter(self, name: str) -> None:
        """None is ever loaded."""

    def clear(self, blocks: Sequence[int]) -> None:
        self._tell([CLEAR, *blocks])
        self._layers.clear(blocks)

    def close(self) -> None:
        try:
            self._tell([END])
        except RuntimeError as error:
            log.info("a rank of the pipeline is gone already: %s", error)
        self._workers.kill()
        self._link.abort()
        self._layers.close()

    def _tell(self, row: Sequence[int]) -> None:
        for rank in range(1, self._place.world):
            self._link.send_row(row, rank)

    def _stage(self, pieces: Sequence[Piece]) -> Tensor:
        """Raises EngineStopped: another rank is gone, or this one's memory is full: the others have begun the pass already."""
        try:
            return self._layers.stage(pieces, self._line.receive(sum(len(piece.ids) for piece in pieces)))
        except EngineStopped as error:
            raise EngineStopped(self._gone()) from error
        except OUT_OF_MEMORY as error:
            raise EngineStopped(f"The last stage of the pipeline: {type(error).__name__}: {error}") from error

    def _gone(self) -> str:
        text = GONE if self._place.num_tensor == 1 else RANK_GONE
        return f"{text} {cause}" if (cause := self._link.cause()) else text


def passes_at_once(order: StageOrder, hosts: Sequence[Host]) -> int:
    """As many as stages, so that all work at the same time; where the ranks of one machine want more threads than it has cores, as
    many as machines: what takes turns on the same cores should read its weights once for all streams.
    """
    if order.device != "cpu":
        return order.place.num_stages
    cores = {host.address: host.num_cores for host in hosts}
    wanted = Counter(host.address for host in hosts)
    has_own_cores = all(num * order.num_threads <= cores[address] for address, num in wanted.items())
    return order.place.num_stages if has_own_cores else min(order.place.num_stages, len(cores))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
