"""Training a reward model: a number for every answer, learnt from which of two is better (Bradley-Terry)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1ray.train.objective.base import Bench
from r1ray.train.objective.paired import Paired
from r1ray.train.pairs import PairSet

if TYPE_CHECKING:
    from r1ray.train.objective.reward_trainer import ScoreTrainer

__all__ = ["Rewards"]


class Rewards(Paired):
    """A score head on the base; `model.reward` uses the result."""

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
