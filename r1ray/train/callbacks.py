"""What happens around the steps on a worker: one exchange between the ranks per step, then record, report, save, stop.

The exchange gives every rank the same loss and the same elapsed time, so all of them save and stop at the same step.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1ray.errors import TrainingError
from r1ray.train import checkpoint, universal
from r1ray.train.config import TrainConfig
from r1ray.train.progress import Curve, Step
from r1ray.train.reporter import Reporter
from r1ray.train.saved import check_saved
from r1ray.train.standing import KEPT, MARK, Standing
from r1ray.train.trainer import Paced

__all__ = ["Diverged", "Pace"]

_WORK_PER_SAVE = 9.0
"""Seconds of training for each second of saving: saves by time take a tenth of it at most, however slow the disk is."""
_log = logging.getLogger(__name__)


class Diverged(TrainingError):
    """The loss is no number any more; all ranks see it in the same step, and another try would see it again."""

    agreed = True


@dataclass(slots=True)
class Pace(TrainerCallback):
    """Bound to its trainer after both exist. `elapsed_before_s` is the training time of the attempts before this one."""

    config: TrainConfig
    run: str
    run_directory: Path
    rank: int
    world: int
    reporter: Reporter
    elapsed_before_s: float = 0.0
    is_converted: bool = False
    """Whether the training goes on from a checkpoint of another number of workers."""
    standing: Standing = field(default_factory=Standing)
    saved: list[str] = field(default_factory=list)
    """Names of the checkpoints that every rank has read again and published."""
    trainer: Paced | None = None
    curve: Curve | None = None
    _began: float = 0.0
    _step_began: float = 0.0
    _save_began: float = 0.0
    _saved_at_s: float = 0.0
    """When the last save ended. It and the next are each rank's own until the next exchange, which makes them rank 0's."""
    _save_cost_s: float = 0.0
    _is_stretched: bool = False
    _loss: float = math.nan
    _rate: float = 0.0
    _last: Step | None = None
    _is_leaving: bool = False
    _was_leaving: bool = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._step_began = time.monotonic()
        self._saved_at_s = self.elapsed_before_s
        if self.is_converted:
            universal.separate_steps(self._bound.model_wrapped)
        if self.rank == 0:
            self.curve = Curve(self.run_directory)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Exchange before the learning rate moves on, since that may depend on the elapsed time."""
        trainer = self._bound
        elapsed = self.elapsed_before_s + time.monotonic() - self._began
        clock = (elapsed, self._saved_at_s, self._save_cost_s) if self.rank == 0 else (0.0, 0.0, 0.0)
        told = [trainer.tally.take(), float(self.reporter.is_leaving()), *clock]
        exchanged = torch.tensor(told, dtype=torch.float64, device=args.device)
        if dist.is_initialized():
            dist.all_reduce(exchanged)
        self._loss = exchanged[0].item() / trainer.feed.num_trained(state.global_step)
        self._is_leaving = exchanged[1].item() > 0
        trainer.schedule.elapsed_s, self._saved_at_s, self._save_cost_s = exchanged[2:].tolist()
        self._rate = trainer.learning_rate
        if not math.isfinite(self._loss):
            raise Diverged(
                f"The loss became {self._loss} at step {state.global_step + 1} with learning rate {self._rate:.2g}. Lower "
                f"train.learning_rate (now {self.config.learning_rate:g}) or raise train.warmup_share, and set train.restart=true."
            )

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> TrainerControl:
        trainer = self._bound
        step = self._measured(state)
        is_over = trainer.schedule.is_over(state.global_step, step.seconds)
        if self.config.eval_share and (is_over or state.global_step % self.config.eval_every_steps == 0):
            step = replace(step, marks={**step.marks, MARK: self._examined(state.global_step)})
        self._last = step
        if self.curve is not None:
            self.curve.write(step)
        is_best = self.standing.best_step == state.global_step
        control.should_training_stop = is_over or self.standing.is_over(self.config.early_stopping_patience)
        is_urgent, self._was_leaving = self._is_leaving and not self._was_leaving, self._is_leaving
        control.should_save = control.should_training_stop or is_best or is_urgent or self._is_due(state.global_step)
        self._save_began = time.monotonic()
        if not control.should_save and state.global_step % self.config.log_every_steps == 0:
            self.reporter.report(self._metrics())
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        trainer = self._bound
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        check_saved(source, trainer.num_trained_tensors, trainer.held_norms())
        meta = checkpoint.Meta(
            run=self.run,
            step=state.global_step,
            world_size=self.world,
            zero_stage=self.config.zero_stage,
            elapsed_s=trainer.schedule.elapsed_s,
            standing=self.standing,
        )
        destination = self.run_directory / checkpoint.directory_name(meta.step, meta.elapsed_s)
        metrics = {**self._metrics(), KEPT: self.standing.kept_score(meta.step)}
        self.reporter.save(metrics, source, destination, lambda staged: checkpoint.publish(staged, destination, meta, self.rank))
        self.saved.append(destination.name)
        if self.rank == 0:
            universal.forget(self.run_directory)
        self._step_began = time.monotonic()  # the time of a save is not the next step's
        self._saved_at_s = self.elapsed_before_s + self._step_began - self._began
        self._save_cost_s = self._step_began - self._save_began

    @property
    def _bound(self) -> Paced:
        assert self.trainer is not None, "set trainer before training"
        return self.trainer

    def _examined(self, step: int) -> float:
        """Loss on what was held out, of all ranks together; its time is not the next step's."""
        summed, num_items = self._bound.held_out_loss()
        total = torch.tensor([summed], dtype=torch.float64, device=self._bound.args.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        loss = total.item() / num_items
        self.standing = self.standing.after(step, loss)
        self._step_began = time.monotonic()
        return loss

    def _measured(self, state: TrainerState) -> Step:
        trainer, now = self._bound, time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        done, schedule = state.global_step, trainer.schedule
        norm = getattr(trainer.model_wrapped, "get_global_grad_norm", lambda: None)()
        return Step(
            step=done,
            total_steps=schedule.total_steps,
            loss=self._loss,
            learning_rate=self._rate,
            grad_norm=float(norm) if norm is not None else math.nan,
            tokens=trainer.feed.num_tokens(done - 1),
            seconds=seconds,
            elapsed_s=schedule.elapsed_s,
            remaining_s=self._remaining_s(done),
            marks=trainer.marks(),
        )

    def _remaining_s(self, done: int) -> float:
        """By the mean step of this attempt, capped by the budget."""
        schedule = self._bound.schedule
        share = schedule.progress(done)
        return schedule.elapsed_s * (1 - share) / share if share else 0.0

    def _metrics(self) -> dict[str, float]:
        assert self._last is not None
        return {"step": self._last.step, **self._last.metrics()}

    def _is_due(self, step: int) -> bool:
        by_step = self.config.checkpoint_every_steps is not None and step % self.config.checkpoint_every_steps == 0
        every = self.config.checkpoint_every_seconds
        if every is None:
            return by_step
        interval = self._stretched(every)
        return by_step or self._bound.schedule.elapsed_s - self._saved_at_s >= interval

    def _stretched(self, every: float) -> float:
        """Seconds between the end of a save and the next one."""
        interval = max(every, _WORK_PER_SAVE * self._save_cost_s)
        if interval > every and not self._is_stretched and self.rank == 0:
            self._is_stretched = True
            _log.warning(
                "saving took %.0f s: the next save comes %.0f s after it instead of train.checkpoint_every_seconds=%g, so that saves take "
                "a tenth of the time at most",
                self._save_cost_s,
                interval,
                every,
            )
        return interval
