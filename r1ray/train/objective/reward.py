"""Training a reward model: a number for every answer, learnt from which of two is better (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.data.preferences import LoadedPairs, read_preferences
from r1ray.settings import Settings
from r1ray.train import heldout
from r1ray.train.objective.base import Bench, Objective
from r1ray.train.pairs import PairLimits, PairSet, tokenise_pairs
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.objective.reward_trainer import ScoreTrainer

__all__ = ["Rewards"]


class Rewards(Objective):
    """Pairs in any format; the loss is the mean over the batch's pairs. `model.reward` uses the result."""

    def read(self, config: FinetuneConfig) -> LoadedPairs:
        return read_preferences(config.data)

    def prepare(self, rows: LoadedPairs, base: Artifact, config: FinetuneConfig, settings: Settings) -> PairSet:
        limits = PairLimits(max_length=config.train.max_length, eval_share=config.train.reward.eval_share, seed=config.train.seed)
        return tokenise_pairs(rows, base, config.data, limits, settings.cache)

    def trainer(self, bench: Bench) -> ScoreTrainer:
        from r1ray.train.objective.reward_trainer import ScoreTrainer, reward_arguments
        from r1ray.train.pair_feed import feed_of

        arguments = reward_arguments(bench)  # before the model: ZeRO-3 must be known when it is loaded
        order, tokenizer = bench.order, bench.tokenizer()
        assert isinstance(order.material, PairSet), "prepared by this objective"
        train, held_out = order.material.rows()
        feed = feed_of(bench, train, tokenizer.pad_token_id or 0)
        trainer = ScoreTrainer(bench.model(), arguments, feed=feed, schedule=bench.schedule, tokenizer=tokenizer, callbacks=bench.callbacks)
        trainer.judge_on(held_out, order.run_directory)
        return trainer

    def closing(self, run_directory: Path, say: Callable[[str], object]) -> dict[str, float]:
        """How often, and by how much, the better of two held-out answers has the higher number; before and after."""
        return heldout.told(run_directory, say)
