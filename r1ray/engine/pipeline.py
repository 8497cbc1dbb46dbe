"""A model over several processes or nodes: a backend whose layers are split into stages, one of them here and the others in Ray actors.

The driver (this process, rank 0) has the last stage, where logits become tokens; the actors have the earlier ones, each with its own
layers and its own part of the KV cache. As many passes are under way as there are stages, each of other streams, so that the stages work
at the same time. A stage that dies fails the engine at once, busy or idle: the replica is rebuilt as one unit.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1ray.engine.backend import Piece
from r1ray.engine.stage import CLEAR, END, Link, StageOrder, encode_pass, load_stage, serve_passes
from r1ray.errors import AdapterMismatch, EngineStopped

__all__ = ["PipelineBackend"]

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 300.0  # of a stage for one pass: a dead one is noticed at once, this is for one that hangs
GONE = "A stage of the pipeline is gone."


class StageActor:
    """Runs in a Ray actor: loads at once, then computes until the driver ends."""

    def __init__(self, order: StageOrder) -> None:
        self._layers = load_stage(order)

    def node(self) -> str:
        """Answers when the layers are loaded."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def compute(self, address: str, port: int, rank: int, world: int, hidden: int) -> None:
        """Connect to the others and compute; never returns, so that the call ends when this process does, whatever ended it."""
        try:
            link = Link(address, port, rank, world, timeout_s=ANSWER_TIMEOUT_S)
            serve_passes(self._layers, link, rank, world, hidden)
        except EngineStopped as error:
            log.warning("%s", error)
        except Exception:
            log.exception("stage %d of the pipeline died", rank)
        os._exit(0)  # the neighbours see the connection close at once; Ray sees the actor gone


class PipelineBackend:
    """`orders` are the stages in layer order; the last one is loaded here, the others in actors that reserve `resources` each.

    Inside a placement group (a Serve replica's) stage i takes the group's bundle i + 1, and this process has bundle 0.
    """

    def __init__(self, orders: Sequence[StageOrder], *, hidden: int, resources: Mapping[str, float]) -> None:
        self.depth = len(orders)
        self.lacks = frozenset({"adapters"})
        self.num_blocks = orders[-1].num_blocks
        self._hidden = hidden
        self._world = len(orders)
        self._under_way: deque[list[Piece]] = deque()
        self._actors = _start_actors(orders[:-1], resources)
        try:
            self._layers = load_stage(orders[-1])
            self.nodes = _wait_for(self._actors)
            self._link, self._computing = self._connect()
        except Exception:
            _kill(self._actors)
            raise
        self.vocab_size = self._layers.vocab_size
        self.precision = self._layers.precision

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        return self.collect(self.submit(pieces))

    def submit(self, pieces: Sequence[Piece]) -> object:
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number].ids) > 1)  # the general backend wants decoding rows first
        ordered = [replace(pieces[number], adapter=None) for number in order]
        row = encode_pass(ordered)
        for rank in range(1, self._world):
            self._link.send_row(row, rank)
        self._under_way.append(ordered)
        return order

    def collect(self, submitted: object) -> Tensor:
        pieces = self._under_way.popleft()
        num_tokens = sum(len(piece.ids) for piece in pieces)
        try:
            hidden = self._link.receive(torch.empty(num_tokens, self._hidden), self._world - 1)
        except RuntimeError as error:
            raise EngineStopped(GONE) from error
        logits = self._layers.stage(pieces, hidden)
        rows = torch.split(logits, [piece.num_logits for piece in pieces])
        assert isinstance(submitted, list), "as submit gave it"
        return torch.cat([rows[submitted.index(number)] for number in range(len(rows))])

    def watch(self, lost: Callable[[str], None]) -> None:
        threading.Thread(target=_await_death, args=(self._computing, lost), name="r1ray-stages", daemon=True).start()

    def load_adapter(self, name: str, path: Path) -> None:
        raise AdapterMismatch(
            f"A pipeline of {self._world} stages serves one merged model; adapter {name} at {path} cannot be put beside it."
        )

    def unload_adapter(self, name: str) -> None:
        """None is ever loaded."""

    def clear(self, blocks: Sequence[int]) -> None:
        for rank in range(1, self._world):
            self._link.send_row([CLEAR, *blocks], rank)
        self._layers.clear(blocks)

    def close(self) -> None:
        for rank in range(1, self._world):
            try:
                self._link.send_row([END], rank)
            except RuntimeError as error:
                log.info("stage %d is gone already: %s", rank, error)
        _kill(self._actors)
        self._layers.close()

    def _connect(self) -> tuple[Link, list[Any]]:
        """The link, and a reference per actor that resolves when it is gone."""
        import ray

        address, port = ray.util.get_node_ip_address(), _free_port()
        computing = [
            actor.compute.remote(address, port, rank, self._world, self._hidden) for rank, actor in enumerate(self._actors, start=1)
        ]
        return Link(address, port, 0, self._world, timeout_s=ANSWER_TIMEOUT_S), computing


def _start_actors(orders: Sequence[StageOrder], resources: Mapping[str, float]) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    actors = []
    for number, order in enumerate(orders):
        options: dict[str, Any] = dict(resources)
        if group is not None and group.bundle_count > 1:
            options["num_cpus"] = 0  # the bundle is the replica's already; the stages of its next version must fit beside these
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=1 + number % (group.bundle_count - 1)
            )
        actors.append(ray.remote(StageActor).options(**options).remote(order))
    return actors


def _wait_for(actors: Sequence[Any]) -> list[str]:
    import ray
    from ray.exceptions import RayError

    try:
        nodes: list[str] = ray.get([actor.node.remote() for actor in actors], timeout=LOAD_TIMEOUT_S)
    except RayError as error:
        raise EngineStopped(f"A stage of the pipeline could not load its layers: {error}.") from error
    return nodes


def _await_death(computing: list[Any], lost: Callable[[str], None]) -> None:
    import ray
    from ray.exceptions import RayError

    ended, _ = ray.wait(computing, num_returns=1)
    try:
        ray.get(ended)
    except RayError as error:
        log.info("a stage of the pipeline ended: %s", error)
    lost(GONE)  # of no effect where the engine ended it


def _kill(actors: Sequence[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
