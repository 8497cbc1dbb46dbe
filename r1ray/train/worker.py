"""What each Ray Train worker does: agree on where to start, train by its objective, leave checkpoints; returns rank 0's summary.

Every rank runs this same function with the same order; what differs is the rank. Knows no registry and no data format.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import OutOfMemory, R1RayError, TrainingError
from r1ray.train import checkpoint, shared
from r1ray.train.backoff import rows_per_pass
from r1ray.train.batches import accumulation_steps
from r1ray.train.failures import ran_out_of_memory
from r1ray.train.objective import objective_of
from r1ray.train.objective.base import Bench
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import layout_of
from r1ray.train.peers import Peers
from r1ray.train.precision import check_dtype
from r1ray.train.reporter import RayReporter, Reporter
from r1ray.train.resume import agreed_start
from r1ray.train.schedule import Schedule
from r1ray.train.standing import Standing

if TYPE_CHECKING:
    from r1ray.train.trainer import Paced

__all__ = ["Attempt", "work"]

_log = logging.getLogger(__name__)


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry: `{"order": WorkOrder, "token": what the driver has laid into the run's directory}` -> summary.

    An error that all ranks saw is returned under `error` instead of raised: Ray would start the workers again only to see it again.
    """
    import ray.train

    _quieten()
    order: WorkOrder = loop_config["order"]
    context = ray.train.get_context()
    peers = Peers.of_group(context.get_world_rank(), context.get_world_size())
    try:
        shared.check(order.run_directory, loop_config["token"], peers)
        return Attempt(order, rank=peers.rank, world=peers.world, reporter=RayReporter(), peers=peers).run()
    except R1RayError as error:
        return _told(error, peers)


def _told(error: R1RayError, peers: Peers) -> dict[str, Any]:
    """What all ranks saw as their result; what this one alone saw is raised, and Ray Train ends the others, who wait for it."""
    if getattr(error, "agreed", False):
        return {"error": error}
    if isinstance(error, TrainingError):
        raise error
    if peers.fail_alike(error):  # a user's mistake
        return {"error": error}
    raise type(error)(f"{error} Only worker {peers.rank} on {socket.gethostname()} says so.") from error


class Attempt:
    """One rank's part of a training, from the last checkpoint to the end; needs a process group, not Ray."""

    def __init__(self, order: WorkOrder, *, rank: int, world: int, reporter: Reporter, peers: Peers | None = None) -> None:
        self.order, self.config = order, order.config
        self.rank, self.world, self.reporter = rank, world, reporter
        self.peers = peers or Peers.of_group(rank, world)
        self.layout = layout_of(self.config, world)
        self.accumulation = accumulation_steps(self.config.rows_per_batch, self.layout.data, self.config.micro_batch_size)
        self._checked: list[str] = []
        """Names of checkpoints of which the ranks have read every byte in this attempt."""

    def run(self) -> dict[str, Any]:
        import torch

        from r1ray.environment import disable_deepspeed_shm

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        disable_deepspeed_shm()
        check_dtype(self.order, self.peers)
        start = agreed_start(self.order, self.layout, self.peers)
        self._checked += [start[0].name] if start else []
        if start is not None and start[1].standing.is_over(self.config.early_stopping_patience):
            return {"step": start[1].step, "elapsed_s": start[1].elapsed_s, "checked": self._checked}
        trainer = self._trainer(start[1] if start else None)
        if start is not None and start[1].world_size != self.world:
            self._reseed(start[1].step)
        try:
            trainer.train(resume_from_checkpoint=str(start[0]) if start else None)
        except Exception as error:
            if ran_out_of_memory(error):
                raise self._out_of_memory(error, trainer) from error
            if checkpoint.out_of_room(error, self.order.run_directory):
                raise checkpoint.disk_full(self.order.run_directory, error) from error
            raise
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        told = {"step": trainer.state.global_step, "elapsed_s": trainer.schedule.elapsed_s, "peak_memory_mb": _peak_mb()}
        return {**told, "checked": self._checked}

    def _out_of_memory(self, error: BaseException, trainer: Paced) -> OutOfMemory:
        """`in_step`: it came with a batch, so fewer rows at a time may fit."""
        began = trainer.state.max_steps > 0
        place = f"in step {trainer.state.global_step + 1}" if began else "before the first step"
        words = str(error).strip().splitlines()[0][:200].rstrip(".")
        told = OutOfMemory(
            f"Worker {self.rank} ran out of memory {place}, with {rows_per_pass(self.config)} dialogues per forward pass: {words}."
        )
        told.in_step = began  # type: ignore[attr-defined]
        return told

    @property
    def _staging(self) -> Path:
        return checkpoint.staging(self.order.run_directory, self.rank)

    def _reseed(self, step: int) -> None:
        """Random states are one per rank of the old number; dropout goes on from the seed and the step instead."""
        from transformers import set_seed

        set_seed(self.config.seed + step)

    def _trainer(self, resumed: checkpoint.Meta | None) -> Paced:
        from r1ray.train.callbacks import Pace

        order, config = self.order, self.config
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        elapsed = resumed.elapsed_s if resumed else 0.0
        is_converted = resumed is not None and resumed.world_size != self.world and resumed.zero_stage > 0
        pace = Pace(
            config=config,
            run=order.run,
            run_directory=order.run_directory,
            rank=self.rank,
            world=self.world,
            reporter=self.reporter,
            elapsed_before_s=elapsed,
            is_converted=is_converted,
            standing=resumed.standing if resumed else Standing(),
            saved=self._checked,
        )
        bench = Bench(
            order=order,
            rank=self.layout.place(self.rank).data,
            num_workers=self.layout.data,
            layout=self.layout,
            global_rank=self.rank,
            accumulation=self.accumulation,
            staging=self._staging,
            schedule=Schedule(order.num_steps, config.warmup_share, config.floor_share, config.max_seconds, elapsed),
            callbacks=[pace],
            universal=is_converted,
        )
        trainer = objective_of(config.objective).trainer(bench)
        trainer.layout = self.layout
        pace.trainer = trainer
        return trainer


def _peak_mb() -> float:
    """Most memory that this worker has held: the GPU's where there is one, else the process's."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _quieten() -> None:
    """DeepSpeed's use of deprecated collectives warns in every step; Ray Train logs every report of every rank."""
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("DeepSpeed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
