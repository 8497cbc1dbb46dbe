"""Reinforcement learning: answers of its own, judged on axes that are kept apart, the better ones of a group made likelier (GRPO)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.data.read import Loaded, read_conversations
from r1ray.data.split import origins_digest, stem_hash
from r1ray.settings import Settings
from r1ray.train import heldout
from r1ray.train.objective.base import Bench, Objective, identity
from r1ray.train.order import plan_of
from r1ray.train.prompts import PromptLimits, PromptSet, prepare_prompts
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.objective.grpo_trainer import GroupTrainer

__all__ = ["Groups"]

_log = logging.getLogger(__name__)


class Groups(Objective):
    """Prompts with a reference answer; rewards instead of labels."""

    def read(self, config: FinetuneConfig) -> Loaded:
        """Their ids say which prompts are held out together: other ids are another run."""
        loaded = read_conversations(config.data)
        origins = origins_digest(stem_hash(one.id) for one in loaded.conversations) if config.train.grpo.num_held_out else None
        return replace(loaded, data_hash=identity(loaded.data_hash, origins))

    def prepare(self, rows: Loaded, base: Artifact, config: FinetuneConfig, settings: Settings) -> PromptSet:
        train = config.train
        limits = PromptLimits(
            max_tokens=train.max_length - train.grpo.max_new_tokens, num_held_out=train.grpo.num_held_out, seed=config.data.seed
        )
        return prepare_prompts(rows, base, config.data, limits, settings.cache)

    def trainer(self, bench: Bench) -> GroupTrainer:
        from r1ray.registry import Registry
        from r1ray.train.objective.grpo_feed import PromptFeed
        from r1ray.train.objective.grpo_trainer import GroupTrainer, grpo_arguments
        from r1ray.train.rewards import build_scales
        from r1ray.train.rollouts import choose_rollouts, engine_for

        arguments = grpo_arguments(bench)  # before the model: ZeRO-3 must be known when it is loaded
        order, material = bench.order, bench.order.material
        assert isinstance(material, PromptSet), "prepared by this objective"
        feed = PromptFeed(
            prompts=material.rows(),
            plan=plan_of(order.config, material.lengths()),
            num_steps=order.num_steps,
            rank=bench.rank,
            num_workers=bench.num_workers,
            accumulation=bench.accumulation,
            num_generations=order.config.grpo.num_generations,
        )
        by_engine, reason = choose_rollouts(order)
        if bench.rank == 0:
            _log.warning("answers by %s: %s", "r1ray's engine" if by_engine else "the trained model itself", reason)
        trainer = GroupTrainer(
            bench.model(),
            arguments,
            bench=bench,
            feed=feed,
            scales=build_scales(order.config.grpo.rewards, Registry(order.settings)),
        )
        if by_engine:
            trainer.answer_by(engine_for(order, feed.answers_per_rank))
        trainer.judge_on(material.held_out(), order.run_directory)
        return trainer

    def closing(self, run_directory: Path, say: Callable[[str], object]) -> dict[str, float]:
        """Mean reward on the held-out prompts, before and after."""
        return heldout.told(run_directory, say)
