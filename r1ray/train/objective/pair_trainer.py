"""What the trainers of pairs share: how often and how far the better answer is ahead, per step and on the pairs held out.

`scores` and `figures` are the objective's; this module deals rows to the ranks and adds up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments

from r1ray.evaluate.progress import Progress
from r1ray.train import heldout
from r1ray.train.batches import BatchPlan, accumulation_steps
from r1ray.train.pair_feed import PairFeed, Pass, collate
from r1ray.train.pairs import PairRow
from r1ray.train.trainer import PacedTrainer

__all__ = ["PairTrainer", "Scores", "ahead"]

Scores = tuple[float, float]
"""Of the better and the worse answer."""
_PROGRESS_S = 10


class PairTrainer(PacedTrainer):
    """`class Ours(PairTrainer, DPOTrainer)`; its callbacks begin with `HeldOut(self)`, its `compute_loss` ends with `watch`."""

    feed: PairFeed
    judged_rows: Sequence[PairRow] = ()
    run_directory = Path()
    _watched: torch.Tensor | None = None
    _metrics: dict[str, Any]

    @abstractmethod
    def scores(self, model: Any, inputs: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the better and the worse answers of a forward pass, [n] each; called without gradients."""

    @abstractmethod
    def figures(self, scores: Mapping[int, Scores]) -> dict[str, float]:
        """What the scores of all held-out rows say."""

    def judge_on(self, rows: Sequence[PairRow], run_directory: Path) -> None:
        """Score `rows` before and after, and note the figures in `run_directory`."""
        self.judged_rows, self.run_directory = rows, run_directory

    def before(self) -> Mapping[int, Scores]:
        """Scores of the held-out rows before training."""
        return self.judged()

    def judged(self) -> Mapping[int, Scores]:
        """Scores of the held-out rows now."""
        with self.progress("held-out pairs", len(self.judged_rows)) as progress:
            return self.scored(self.model_wrapped, self.judged_rows, self.scores, progress.at)

    def progress(self, what: str, total: int) -> Progress:
        """Lines of one rank for the job log."""
        return Progress(_PROGRESS_S if self.accelerator.is_main_process else None, what, total)

    def scored(
        self,
        model: Any,
        rows: Sequence[PairRow],
        scoring: Callable[[Any, Pass], tuple[torch.Tensor, torch.Tensor]],
        on_pass: Callable[[int], object] = lambda _: None,
    ) -> dict[int, Scores]:
        """Place in `rows` -> scores; each rank computes its share, all get all. `on_pass` is told how many rows are about done."""
        pad_id, mine = self.feed.pad_id, []
        plan = BatchPlan([row.length for row in rows], batch_size=len(rows), num_epochs=1, seed=0, group_window=1)
        world, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        passes = plan.micro_batches(
            0, rank=self.accelerator.process_index, num_workers=world, accumulation=accumulation_steps(len(rows), world, size)
        )
        training = self.model.training
        model.eval()
        with torch.no_grad():
            for places in passes:  # ZeRO-3 gathers weights in each: a rank without rows takes part with one that does not count
                inputs = collate([rows[place] for place in places or (0,)], pad_id)
                pair = scoring(model, {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()})
                mine += list(zip(places, *(side.tolist() for side in pair), strict=False))
                on_pass(min(len(rows), len(mine) * world))
        model.train(training)
        return {place: (better, worse) for place, better, worse in gather_object(mine)}

    @contextmanager
    def untold(self) -> Iterator[None]:
        """Around TRL's loss, which gathers figures in each pass for a log of its own: ranks differ in pairs, and `watch` is enough."""
        for name in ("gather", "gather_for_metrics"):
            setattr(self.accelerator, name, lambda tensor: tensor)  # hides the method
        try:
            yield
        finally:
            del self.accelerator.gather, self.accelerator.gather_for_metrics
            self._metrics["train"].clear()

    def watch(self, margins: torch.Tensor) -> None:
        """Remember how far the better answers of a forward pass were ahead."""
        seen = torch.stack([margins.sum(), ahead(margins).sum(), torch.tensor(float(len(margins)), device=margins.device)]).double()
        self._watched = seen if self._watched is None else self._watched + seen

    def marks(self) -> dict[str, float]:
        """Over all pairs of the step: how far the better answer was ahead, and how often."""
        sums = self._watched if self._watched is not None else torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        self._watched = None
        if dist.is_initialized():
            dist.all_reduce(sums)
        margin, right, count = sums.tolist()
        return {"margin": margin / count, "accuracy": right / count}


def ahead(margins: torch.Tensor) -> torch.Tensor:
    """1 where the better answer is ahead, a half where both are level."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


class HeldOut(TrainerCallback):
    """Judges before the first step and after the last one; before the clock in the list of callbacks, which must not count it."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 0 and self.trainer.judged_rows:
            self._note("before", self.trainer.before())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        if trainer.judged_rows:
            self._note("after", trainer.judged())

    def _note(self, when: str, scores: Mapping[int, Scores]) -> None:
        if self.trainer.accelerator.is_main_process:
            heldout.note(self.trainer.run_directory, when, self.trainer.figures(scores))
