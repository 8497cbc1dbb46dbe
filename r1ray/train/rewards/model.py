"""Rewards that are not rules: a registered reward model, and a user's own function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from r1ray.errors import InvalidValue
from r1ray.registry import Registry
from r1ray.train.rewards.base import Answer
from r1ray.types import Message

__all__ = ["Called", "Modelled", "Scorer", "load_call"]


class Scorer(Protocol):
    """What a reward model can do (`r1ray.model.reward` loads one)."""

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Modelled:
    """A reward model reads the dialogue and the answer without its reasoning, as it was taught."""

    scorer: Scorer

    @classmethod
    def load(cls, reference: str, registry: Registry) -> Modelled:
        """The version that `reference` names, in this process.

        Raises:
            RegistryError: there is no such version.
            UnsupportedModel: it is no reward model.
        """
        from r1ray.model.reward import load_reward_model

        return cls(load_reward_model(registry.resolve(reference), registry=registry))

    def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        return self.scorer.score([answer.prompt for answer in answers], [answer.content for answer in answers])


@dataclass(frozen=True, slots=True)
class Called:
    """`function(answers)` gives a number per answer."""

    function: Callable[[Sequence[Answer]], Sequence[float]]

    def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        return self.function(answers)


def load_call(path: str) -> Called:
    """`module:function` as a judge.

    Raises:
        InvalidValue: the module cannot be imported here, has no such function, or the function does not take one argument.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidValue(
            f"Reward call={path} cannot be loaded: {error}. Write module:function, and submit the job with a working directory that has "
            "the module."
        ) from error
    if not callable(found) or not _takes_one(found):
        raise InvalidValue(f"Reward call={path} is no function of one argument. Write def {name}(answers) -> list of numbers.")
    return Called(found)


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(())
    except TypeError:
        return False
    return True
