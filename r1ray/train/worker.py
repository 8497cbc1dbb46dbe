"""What each Ray Train worker does: load the base, put the adapter on, train, leave checkpoints; returns rank 0's summary.

Every rank runs this same function with the same order; what differs is the rank. Knows no registry and no data format.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import CheckpointCorrupt, R1RayError, TrainingError
from r1ray.settings import Settings
from r1ray.train import checkpoint
from r1ray.train.batches import BatchPlan, accumulation_steps
from r1ray.train.config import TrainConfig
from r1ray.train.schedule import Schedule
from r1ray.train.tokens import TokenSet
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from r1ray.train.trainer import SupervisedTrainer

__all__ = ["WorkOrder", "plan_of", "work"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """All that a worker needs, resolved by the driver; small, since it is pickled."""

    config: TrainConfig
    base: Artifact
    tokens: TokenSet
    run: str
    run_directory: Path
    num_steps: int
    dtype: str
    attention: str
    settings: Settings


def plan_of(config: TrainConfig, lengths: list[int]) -> BatchPlan:
    """The batches that driver and workers agree on."""
    return BatchPlan(
        lengths, batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed, group_window=config.group_window
    )


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

    def _trainer(self, resumed: checkpoint.Meta | None) -> SupervisedTrainer:
        from r1ray.model.load import load_tokenizer
        from r1ray.train.callbacks import Pace
        from r1ray.train.feed import Feed
        from r1ray.train.trainer import SupervisedTrainer, trainer_arguments

        order, config = self.order, self.config
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        bf16 = order.dtype == "bfloat16"
        arguments = trainer_arguments(config, output=self._staging, num_steps=order.num_steps, accumulation=self.accumulation, bf16=bf16)
        tokenizer = load_tokenizer(order.base)
        ids, masks = order.tokens.rows()
        feed = Feed(
            input_ids=ids,
            masks=masks,
            plan=plan_of(config, [len(row) for row in ids]),
            num_steps=order.num_steps,
            rank=self.rank,
            num_workers=self.world,
            accumulation=self.accumulation,
            pad_id=tokenizer.pad_token_id or 0,
            packing=config.packing,
        )
        elapsed = resumed.elapsed_s if resumed else 0.0
        schedule = Schedule(order.num_steps, config.warmup_share, config.floor_share, config.max_seconds, elapsed)
        pace = Pace(config=config, run=order.run, run_directory=order.run_directory, rank=self.rank, elapsed_before_s=elapsed)
        model = self._model()
        trainer = SupervisedTrainer(model, arguments, feed=feed, schedule=schedule, tokenizer=tokenizer, callbacks=[pace])
        pace.trainer = trainer
        return trainer

    def _model(self) -> PreTrainedModel:
        """The base, every weight trained; or frozen, with a fresh adapter that all ranks initialise alike."""
        from transformers import set_seed

        from r1ray.model.adapters import lora
        from r1ray.model.checkpoint import read_json
        from r1ray.model.family import family_of
        from r1ray.model.load import load_model
        from r1ray.registry import Registry

        order = self.order
        model = load_model(order.base, registry=Registry(order.settings), dtype=order.dtype, device="cpu")  # type: ignore[arg-type]
        model.set_attn_implementation(order.attention)
        model.config.use_cache = False
        model.train()
        if self.config.method == "full":
            return model
        from peft import get_peft_model

        set_seed(self.config.seed)
        shape = self.config.lora
        family = family_of(read_json(order.base.path / "config.json"))
        settings = lora(family, rank=shape.rank, alpha=shape.alpha, dropout=shape.dropout, targets=shape.targets, use_dora=shape.dora)
        # DeepSpeed keeps the float32 master copy; two dtypes in one model would break ZeRO-3's gathering
        return get_peft_model(model, settings, autocast_adapter_dtype=False)


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
