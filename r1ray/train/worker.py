"""What each Ray Train worker does: agree on where to start, train by its objective, leave checkpoints; returns rank 0's summary.

Every rank runs this same function with the same order; what differs is the rank. Knows no registry and no data format.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import CheckpointCorrupt, OutOfMemory, R1RayError, TrainingError
from r1ray.train import checkpoint, universal
from r1ray.train.backoff import rows_per_pass
from r1ray.train.batches import accumulation_steps
from r1ray.train.failures import ran_out_of_memory
from r1ray.train.objective import objective_of
from r1ray.train.objective.base import Bench
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import layout_of
from r1ray.train.reporter import RayReporter, Reporter
from r1ray.train.schedule import Schedule
from r1ray.train.standing import Standing

if TYPE_CHECKING:
    from r1ray.train.trainer import Paced

__all__ = ["Attempt", "work"]

_log = logging.getLogger(__name__)


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry: `{"order": WorkOrder}` -> summary.

    An error that all ranks saw is returned under `error` instead of raised: Ray would start the workers again only to see it again.
    """
    _quieten()
    order: WorkOrder = loop_config["order"]
    try:
        import ray.train

        context = ray.train.get_context()
        return Attempt(order, rank=context.get_world_rank(), world=context.get_world_size(), reporter=RayReporter()).run()
    except R1RayError as error:
        if getattr(error, "agreed", False) or not isinstance(error, TrainingError):  # a user's mistake is the same on every rank
            return {"error": error}
        raise


class Attempt:
    """One rank's part of a training, from the last checkpoint to the end; needs a process group, not Ray."""

    def __init__(self, order: WorkOrder, *, rank: int, world: int, reporter: Reporter) -> None:
        self.order, self.config = order, order.config
        self.rank, self.world, self.reporter = rank, world, reporter
        self.layout = layout_of(self.config, world)
        self.accumulation = accumulation_steps(self.config.rows_per_batch, self.layout.data, self.config.micro_batch_size)

    def run(self) -> dict[str, Any]:
        import torch

        from r1ray.cluster import disable_deepspeed_shm

        if not self.config.use_gpu:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        disable_deepspeed_shm()
        start = self._agreed_checkpoint()
        if start is not None and start[1].standing.is_over(self.config.early_stopping_patience):
            return {"step": start[1].step, "elapsed_s": start[1].elapsed_s}
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
        return {"step": trainer.state.global_step, "elapsed_s": trainer.schedule.elapsed_s, "peak_memory_mb": _peak_mb()}

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
        """On the checkpoints' file system, so that publishing is a rename."""
        return self.order.run_directory / ".saving" / f"rank{self.rank}"

    def _agreed_checkpoint(self) -> tuple[Path, checkpoint.Meta] | None:
        """Rank 0 looks, all follow: two ranks that judged for themselves could start from different steps."""
        import torch.distributed as dist

        verdict: list[Any] = [None]
        if self.rank == 0:
            try:
                verdict = [self._start()]
            except TrainingError as error:
                verdict = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(verdict, src=0)
        if isinstance(verdict[0], R1RayError):
            verdict[0].agreed = True  # type: ignore[attr-defined]
            raise verdict[0]
        if verdict[0] is not None and self.rank == 0:
            _log.warning("resuming %s from step %d", self.order.run, verdict[0][1].step)
        return verdict[0]

    def _start(self) -> tuple[Path, checkpoint.Meta] | None:
        """The last good checkpoint, in a form that this number of workers can load."""
        found = checkpoint.last_good(self.order.run_directory)
        if found is None:
            return None
        directory, meta = found
        _check_stage(directory, meta, self.config.zero_stage)
        if meta.world_size == self.world:
            return found
        if self.layout.split > 1:
            raise CheckpointCorrupt(
                f"{directory} was written by {meta.world_size} workers, and this job has {self.world}; where workers share a model "
                f"(train.parallelism) their number cannot change. Set train.num_workers={meta.world_size}, or train.restart=true."
            )
        if meta.zero_stage == 0:  # splits nothing over the workers
            return found
        _log.warning("%s was written by %d workers: converting it for %d", directory.name, meta.world_size, self.world)
        return universal.converted(directory), meta

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


def _check_stage(directory: Path, meta: checkpoint.Meta, zero_stage: int) -> None:
    """Each stage lays its states out in its own way."""
    if meta.zero_stage != zero_stage:
        raise CheckpointCorrupt(
            f"{directory} was written at ZeRO stage {meta.zero_stage}; this job has stage {zero_stage}. Set "
            f"train.zero_stage={meta.zero_stage} to resume, or train.restart=true to start over."
        )


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
