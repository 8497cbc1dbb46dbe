"""What a training of the sweep is judged by: dialogues held out of all trainings. Knows no Ray and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from r1ray.data.config import DataConfig
from r1ray.data.read import read_conversations
from r1ray.data.records import Loaded
from r1ray.data.schema import data_hash
from r1ray.data.split import hold_out
from r1ray.errors import NothingToTrain
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.types import Conversation

__all__ = ["divide"]


def divide(data: DataConfig, sweep: HyperparameterSweepConfig) -> tuple[Loaded, Loaded]:
    """(to train on, held out): a share of every intent, at most `eval_limit`.

    Raises:
        NothingToTrain: either would be empty.
    """
    loaded = read_conversations(data)
    kept, held = hold_out(loaded.conversations, sweep.eval_share, seed=sweep.seed, by_intent=True)
    if not kept or not held:
        raise NothingToTrain(f"{len(kept)} dialogues to train on, {len(held)} held out by eval_share={sweep.eval_share:g}. Give more rows.")
    return _part(loaded, kept), _part(loaded, held[: sweep.eval_limit])


def _part(loaded: Loaded, conversations: Sequence[Conversation]) -> Loaded:
    return replace(loaded, conversations=tuple(conversations), data_hash=data_hash(conversations))
