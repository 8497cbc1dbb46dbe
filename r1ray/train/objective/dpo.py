"""Learning from preferences: the better of two answers made likelier than the worse one, measured against the base (DPO)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.data.preferences import LoadedPairs, read_preferences
from r1ray.settings import Settings
from r1ray.train import heldout
from r1ray.train.objective.base import Bench, Objective
from r1ray.train.pairs import PairLimits, PairSet, tokenise_pairs
from r1ray.train.reference import Reference
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.objective.dpo_trainer import PreferenceTrainer

__all__ = ["Preferences"]


class Preferences(Objective):
    """Pairs in any format; the loss is the mean over the batch's pairs."""

    def read(self, config: FinetuneConfig) -> LoadedPairs:
        return read_preferences(config.data)

    def prepare(self, rows: LoadedPairs, base: Artifact, config: FinetuneConfig, settings: Settings) -> PairSet:
        limits = PairLimits(max_length=config.train.max_length, eval_share=config.train.dpo.eval_share, seed=config.train.seed)
        return tokenise_pairs(rows, base, config.data, limits, settings.cache)

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
        trainer.refer_to(Reference.of(order))
        return trainer

    def closing(self, run_directory: Path, say: Callable[[str], object]) -> dict[str, float]:
        """How often, and by how much, the better of two held-out answers is preferred; before and after."""
        return heldout.told(run_directory, say)
