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

from r1ray.errors import CheckpointCorrupt, R1RayError, TrainingError
from r1ray.train import checkpoint
from r1ray.train.batches import accumulation_steps
from r1ray.train.objective import objective_of
from r1ray.train.objective.base import Bench
from r1ray.train.order import WorkOrder
from r1ray.train.schedule import Schedule

if TYPE_CHECKING:
    from r1ray.train.trainer import PacedTrainer

__all__ = ["work"]

_log = logging.getLogger(__name__)


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry: `{"order": WorkOrder}` -> summary.

    An error that all ranks saw is returned under `error` instead of raised: Ray would start the workers again only to see it again.
    """
    _quieten()
    order: WorkOrder = loop_config["order"]
    try:
        return _Work(order).run()
    except TrainingError as error:
        if getattr(error, "agreed", False):
            return {"error": error}
        raise


class _Work:
    def __init__(self, order: WorkOrder) -> None:
        import ray.train

        context = ray.train.get_context()
        self.order, self.config = order, order.config
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.accumulation = accumulation_steps(self.config.batch_size, self.world, self.config.micro_batch_size)

    def run(self) -> dict[str, Any]:
        import torch

        from r1ray.cluster import disable_deepspeed_shm

        if not self.config.use_gpu:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        disable_deepspeed_shm()
        start = self._agreed_checkpoint()
        trainer = self._trainer(start[1] if start else None)
        try:
            trainer.train(resume_from_checkpoint=str(start[0]) if start else None)
        except Exception as error:
            if checkpoint.out_of_room(error, self.order.run_directory):
                raise checkpoint.disk_full(self.order.run_directory, error) from error
            raise
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        return {"step": trainer.state.global_step, "elapsed_s": trainer.schedule.elapsed_s}

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
                verdict = [checkpoint.last_good(self.order.run_directory)]
                _check_world(verdict[0], self.order, self.world)
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

    def _trainer(self, resumed: checkpoint.Meta | None) -> PacedTrainer:
        from r1ray.train.callbacks import Pace

        order, config = self.order, self.config
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        elapsed = resumed.elapsed_s if resumed else 0.0
        place = {"run": order.run, "run_directory": order.run_directory, "rank": self.rank, "world": self.world}
        pace = Pace(config=config, **place, elapsed_before_s=elapsed)
        bench = Bench(
            order=order,
            rank=self.rank,
            num_workers=self.world,
            accumulation=self.accumulation,
            staging=self._staging,
            schedule=Schedule(order.num_steps, config.warmup_share, config.floor_share, config.max_seconds, elapsed),
            callbacks=[pace],
        )
        trainer = objective_of(config.objective).trainer(bench)
        pace.trainer = trainer
        return trainer


def _check_world(start: tuple[Path, checkpoint.Meta] | None, order: WorkOrder, world: int) -> None:
    """DeepSpeed's shards fit the number of ranks and the stage that wrote them."""
    if start is None:
        return
    directory, meta = start
    if meta.world_size != world or meta.zero_stage != order.config.zero_stage:
        raise CheckpointCorrupt(
            f"{directory} was written by {meta.world_size} workers at ZeRO stage {meta.zero_stage}; this job has {world} at stage "
            f"{order.config.zero_stage}. Set train.num_workers={meta.world_size} train.zero_stage={meta.zero_stage} to resume, or "
            "train.restart=true to start over."
        )


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
