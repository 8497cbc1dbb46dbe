"""What the objectives of pairs share: the rows, their tokens, and what the held-out ones say before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.data.preferences import LoadedPairs, read_preferences
from r1ray.data.split import origins_digest, stem_hash
from r1ray.settings import Settings
from r1ray.train import heldout
from r1ray.train.objective.base import Objective, identity
from r1ray.train.pairs import PairLimits, PairSet, tokenise_pairs
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.blocks import DpoSettings, RewardModelSettings
    from r1ray.train.config import FinetuneConfig

__all__ = ["Paired"]


class Paired(Objective):
    """Pairs in any format; the loss is the mean over the batch's pairs."""

    def read(self, config: FinetuneConfig) -> LoadedPairs:
        """Their ids say which pairs are held out together: other ids are another run."""
        loaded = read_preferences(config.data)
        origins = origins_digest(stem_hash(pair.id) for pair in loaded.pairs) if _own(config).eval_share else None
        return replace(loaded, data_hash=identity(loaded.data_hash, origins))

    def prepare(self, rows: LoadedPairs, base: Artifact, config: FinetuneConfig, settings: Settings) -> PairSet:
        train, own = config.train, _own(config)
        limits = PairLimits(max_length=train.max_length, eval_share=own.eval_share, eval_limit=own.eval_limit, seed=train.seed)
        return tokenise_pairs(rows, base, config.data, limits, settings.cache)

    def closing(self, run_directory: Path, say: Callable[[str], object]) -> dict[str, float]:
        """How often, and by how much, the better of two held-out answers is ahead; before and after."""
        return heldout.told(run_directory, say)


def _own(config: FinetuneConfig) -> DpoSettings | RewardModelSettings:
    return config.train.dpo if config.train.objective == "dpo" else config.train.reward
