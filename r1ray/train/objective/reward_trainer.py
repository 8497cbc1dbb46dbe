"""TRL's RewardTrainer with our batches and our schedule; each pair counts alike however passes and ranks are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import RewardConfig, RewardTrainer

from r1ray.train.objective.base import Bench
from r1ray.train.objective.pair_trainer import HeldOut, PairTrainer, Scores, ahead
from r1ray.train.pair_feed import PairFeed, Pass
from r1ray.train.schedule import Schedule

__all__ = ["ScoreTrainer", "reward_arguments"]


class ScoreTrainer(PairTrainer, RewardTrainer):
    """The loss of a step is the mean over all its pairs. Call `judge_on` before training."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: RewardConfig,
        *,
        feed: PairFeed,
        schedule: Schedule,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        shown = Dataset.from_dict({"chosen_ids": [[0]], "rejected_ids": [[0]]})  # TRL looks at it; the feed gives the pairs
        super().__init__(
            model=model, args=arguments, train_dataset=shown, processing_class=tokenizer, callbacks=[HeldOut(self), *callbacks]
        )
        self.pace_by(feed, schedule)

    def compute_loss(self, model: Any, inputs: Pass, *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        num_pairs = int(inputs["num_pairs"])
        with self.untold():
            loss, outputs = super().compute_loss(model, _asked(inputs), return_outputs=True)
        if num_pairs:
            better, worse = outputs.logits.detach()[:, 0].chunk(2)
            self.watch(better - worse)
        return self.counted(loss * num_pairs, num_items_in_batch)

    def scores(self, model: Any, inputs: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's numbers."""
        with self.accelerator.autocast():
            better, worse = model(**_asked(inputs), use_cache=False).logits[:, 0].chunk(2)
        return better, worse

    def figures(self, scores: Mapping[int, Scores]) -> dict[str, float]:
        """How often and how far the better answer is ahead."""
        margins = torch.tensor([better - worse for better, worse in scores.values()], dtype=torch.float64)
        return {"accuracy": float(ahead(margins).mean()), "margin": float(margins.mean())}

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def reward_arguments(bench: Bench) -> RewardConfig:
    settings = bench.order.config.reward
    return RewardConfig(
        **bench.arguments(),
        max_length=None,
        center_rewards_coefficient=settings.center or None,
        disable_dropout=False,
    )


def _asked(inputs: Pass) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}
