"""What the processes of one model say to each other: rows of integers, what each has left, why one fails, and the hidden states.

Rows and notes go over gloo and a store. Hidden states go from a stage to the next (`Line`) and the ranks of a stage add up (`tensor_group`)
over NCCL where each of them has a GPU of its own: then nothing leaves the GPUs. Everywhere else it is gloo, through main memory. Knows
neither layers nor passes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from r1ray.engine.memory import Room
from r1ray.errors import EngineStopped

__all__ = ["ROW", "Line", "Link", "Place", "StatesForm", "Way", "choose_way"]

log = logging.getLogger(__name__)

ROW = 1024  # integers in the first message of a row: a step of 32 short streams fits
CAUSE = "cause"  # in the store: why the first rank that failed did
POLL = timedelta(seconds=1)
FOR_EVER = timedelta(days=365)  # an idle engine sends nothing; a dead one closes the connection


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
class StatesForm:
    """Of the hidden states between two stages: (tokens, `hidden`) numbers of `dtype`, computed on `device`."""

    hidden: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Way:
    """What carries tensors between some ranks, and why."""

    carrier: Literal["nccl", "gloo"]
    reason: str


def choose_way(gpus: Sequence[str]) -> Way:
    """`gpus` names each rank's GPU; empty for one that computes on CPUs. NCCL refuses two ranks on one GPU."""
    if not all(gpus):
        return Way("gloo", "they compute on CPUs")
    if (num_gpus := len(set(gpus))) < len(gpus):  # fractions of `stage_gpus` put them there
        return Way("gloo", f"through main memory: {len(gpus)} ranks on {num_gpus} GPUs, and NCCL wants one each")
    return Way("nccl", f"each of {len(gpus)} ranks has a GPU of its own")


class Link:
    """Messages between the processes of one model, and the groups that add up. Its own: the process may have others."""

    def __init__(self, address: str, port: int, place: Place, *, timeout_s: float) -> None:
        torch_distributed: Any = dist  # its stubs lack what follows
        self._timeout = timedelta(seconds=timeout_s)
        is_master = place.rank == 0
        store = torch_distributed.TCPStore(address, port, place.world, is_master, timeout=self._timeout, wait_for_workers=False)
        self._store = store  # the connection dies with it
        self._place = place
        self._address = _own_address(address, port)
        self._group = self._gloo(store, place.rank, place.world)
        self._on_gpus: list[Any] = []
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

    def tensor_group(self, device: str) -> Any:
        """The ranks of this one's stage, which add up. All of them must ask for it."""
        place = self._place
        name = f"stage{place.stage}"
        way = self._way(name, place.tensor, place.num_tensor, device)
        log.info("sums of tensor ranks: %s (%s)", way.carrier, way.reason)
        if way.carrier == "nccl":
            return self._nccl(name, place.tensor, place.num_tensor)
        torch_distributed: Any = dist
        return self._gloo(torch_distributed.PrefixStore(name, self._store), place.tensor, place.num_tensor)

    def line(self, form: StatesForm) -> Line:
        """The way of the states through this rank, open in both directions. All ranks must ask for it.

        Raises:
            EngineStopped: a neighbour is gone, or NCCL cannot reach it.
        """
        place = self._place
        if place.num_stages == 1:
            return Line(self, place, form)
        name = f"line{place.tensor}"
        way = self._way(name, place.stage, place.num_stages, form.device)
        log.info("states between stages: %s, %s (%s)", way.carrier, str(form.dtype).removeprefix("torch."), way.reason)
        line = Line(self, place, form, self._nccl(name, place.stage, place.num_stages) if way.carrier == "nccl" else None)
        line.open()
        return line

    def abort(self) -> None:
        """End what NCCL waits for, from any thread: unlike gloo it does not see that the other process is gone, and a GPU would wait on."""
        groups, self._on_gpus = self._on_gpus, []
        for group in groups:
            group.abort()

    def _way(self, name: str, rank: int, size: int, device: str) -> Way:
        if not device.startswith("cuda"):  # every rank's is of the same kind
            return choose_way([""] * size)
        self._store.set(f"{name}/gpu{rank}", str(torch.cuda.get_device_properties(torch.device(device)).uuid))
        return choose_way([self._awaited(f"{name}/gpu{other}").decode() for other in range(size)])

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
        raise EngineStopped(f"A rank of the pipeline gave no {key} within {self._timeout}.")

    def _nccl(self, name: str, rank: int, size: int) -> Any:
        torch_distributed: Any = dist
        options = torch_distributed.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        group = torch_distributed.ProcessGroupNCCL(torch_distributed.PrefixStore(name, self._store), rank, size, options)
        self._on_gpus.append(group)
        return group

    def _gloo(self, store: Any, rank: int, size: int) -> Any:
        torch_distributed: Any = dist
        gloo = torch_distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address)]
        options._timeout = self._timeout
        return gloo(store, rank, size, options)


class Line:
    """Hidden states from the stage before, and to the one after, in the order of the passes.

    `group`: NCCL's, with a rank per stage; the states then stay on the GPUs. Without one they go over the link's gloo.
    """

    def __init__(self, link: Link, place: Place, form: StatesForm, group: Any = None) -> None:
        self._link = link
        self._place = place
        self._form = form
        self._group = group
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def open(self) -> None:
        """NCCL connects two GPUs when the first states go between them: now, so that what it takes of their memory is seen."""
        if self._group is None:
            return
        received = self.receive(1)
        self.send(torch.zeros(1, self._form.hidden, device=self._form.device) if received is None else received)
        torch.cuda.synchronize(torch.device(self._form.device))

    def receive(self, num_tokens: int) -> Tensor | None:
        """(num_tokens, hidden); None at the first stage.

        Over NCCL it returns before the states are there, and what the GPU is given to do next waits for them.

        Raises:
            EngineStopped: the rank before this one is gone.
        """
        if (before := self._place.before) is None:
            return None
        form = self._form
        try:
            if self._group is None:
                return self._link.receive(torch.empty(num_tokens, form.hidden, dtype=form.dtype), before)
            states = torch.empty(num_tokens, form.hidden, dtype=form.dtype, device=form.device)
            self._group.recv([states], self._place.stage - 1, 0).wait()
        except RuntimeError as error:
            raise EngineStopped(f"Rank {self._place.rank} of the pipeline lost rank {before}: {error}.") from error
        return states

    def send(self, states: Tensor) -> None:
        """Returns at once; nothing at the last stage."""
        if (after := self._place.after) is None:
            return
        if self._group is None:
            self._link.send(states.to("cpu", self._form.dtype).contiguous(), after)
            return
        for work, _ in (arrived := [entry for entry in self._sending if entry[0].is_completed()]):
            work.wait()  # NCCL lets go of what was waited for
        self._sending = self._sending[len(arrived) :]  # they arrive in order
        states = states.to(self._form.dtype).contiguous()
        self._sending.append((self._group.send([states], self._place.stage + 1, 0), states))


def _own_address(address: str, port: int) -> str:
    """This machine's address on the way to the first stage: gloo would otherwise ask the host name, which may resolve to anything."""
    import socket

    with socket.create_connection((address, port), timeout=10) as probe:
        own: str = probe.getsockname()[0]
        return own
