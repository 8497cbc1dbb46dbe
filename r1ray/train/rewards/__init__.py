"""Rewards for reinforcement learning, each judging one axis and kept apart from the others.

    scales = build_scales(config.grpo.rewards, registry)      # on each worker
    rows = judged(scales, answers)                            # one row per answer, one column per scale

The axes of seed 001 and which kinds serve them: helpful (overlap, exact, model), safe (forbidden, model), novel (novelty),
explainable (explanation); format, length, regex and python for the rest. `config` imports without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from r1ray.train.rewards.base import Judge, Scale, column_names

if TYPE_CHECKING:
    from r1ray.registry import Registry
    from r1ray.train.rewards.config import RewardSettings

__all__ = ["build_scales"]


def build_scales(rewards: Sequence[RewardSettings], registry: Registry) -> list[Scale]:
    """The judges of `train.grpo.rewards`, in order.

    Raises:
        InvalidValue: a user's function cannot be loaded.
        RegistryError, UnsupportedModel: a reward model cannot be loaded.
    """
    names = column_names([(reward.axis, reward.kind) for reward in rewards])
    return [Scale(name, reward.weight, _judge(reward, registry)) for name, reward in zip(names, rewards, strict=True)]


def _judge(reward: Any, registry: Registry) -> Judge:
    from r1ray.train.rewards import rules
    from r1ray.train.rewards.model import Modelled, load_call

    kinds: dict[str, Callable[[], Judge]] = {
        "exact": rules.Exact,
        "overlap": rules.Overlap,
        "format": rules.Format,
        "length": lambda: rules.Length(reward),
        "forbidden": lambda: rules.Forbidden(reward),
        "novelty": lambda: rules.Novelty(reward),
        "explanation": lambda: rules.Explanation(reward),
        "regex": lambda: rules.Regex(reward),
        "model": lambda: Modelled.load(reward.model, registry),
        "python": lambda: load_call(reward.call),
    }
    return kinds[reward.kind]()
