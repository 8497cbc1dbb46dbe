"""Learning from preferences: the better of two answers made likelier than the worse one, measured against the base (DPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1ray.train.objective.base import Bench
from r1ray.train.objective.paired import Paired
from r1ray.train.pairs import PairSet
from r1ray.train.reference import Reference

if TYPE_CHECKING:
    from r1ray.train.objective.dpo_trainer import PreferenceTrainer

__all__ = ["Preferences"]


class Preferences(Paired):
    """DPO's losses, against a reference computed once."""

    def trainer(self, bench: Bench) -> PreferenceTrainer:
        from r1ray.train.objective.dpo_trainer import PreferenceTrainer, dpo_arguments
        from r1ray.train.pair_feed import feed_of

        arguments = dpo_arguments(bench)  # before the model: ZeRO-3 must be known when it is loaded
        order, tokenizer = bench.order, bench.tokenizer()
        assert isinstance(order.material, PairSet), "prepared by this objective"
        train, held_out = order.material.rows()
        trainer = PreferenceTrainer(
            bench.model(),
            arguments,
            feed=feed_of(bench, train, tokenizer.pad_token_id or 0),
            schedule=bench.schedule,
            tokenizer=tokenizer,
            callbacks=bench.callbacks,
        )
        trainer.sft_weight = order.config.dpo.sft_weight
        trainer.judge_on(held_out, order.run_directory)
        config = order.config
        is_timed = config.max_seconds is not None and config.max_steps is None
        trainer.refer_to(Reference.of(order), stepwise=is_timed and config.method != "full")  # whose base changes with its first step
        return trainer
