"""A search space as YAML writes it: dotted key -> distribution. Checked before any trial starts; knows no search algorithm's state.

train.learning_rate: {type: loguniform, low: 1e-4, high: 4e-3}
train.lora.rank:     {type: choice, values: [8, 16, 32]}
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from r1ray.config import Config, keys
from r1ray.errors import InvalidValue, UnknownKey

__all__ = ["Choice", "Distribution", "Integer", "LogUniform", "Space", "Uniform", "assign", "bounds", "check_keys", "distributions"]

Value = bool | int | float | str | None


class _Range(Config):
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class Uniform(_Range):
    """Any number between two, all alike."""

    type: Literal["uniform"] = Field(description="uniform")
    step: float | None = Field(default=None, gt=0, description="Only multiples of this above low; null for any.")


class LogUniform(_Range):
    """Any number between two, orders of magnitude alike: for learning rates."""

    type: Literal["loguniform"] = Field(description="loguniform")
    low: float = Field(gt=0, description="Smallest value, above 0.")


class Integer(Config):
    """Whole numbers between two, both included."""

    type: Literal["int"] = Field(description="int")
    low: int = Field(description="Smallest value.")
    high: int = Field(description="Largest value.")
    log: bool = Field(default=False, description="Orders of magnitude alike.")


class Choice(Config):
    """One of a list."""

    type: Literal["choice"] = Field(description="choice")
    values: tuple[Value, ...] = Field(min_length=1, description="The values to choose from.")


Distribution = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="type")]
Space = dict[str, Distribution]


def check_keys(space: Iterable[str], schema: type[BaseModel], *, where: str = "space") -> None:
    """Refuse a key that is no setting of `schema`, or that holds further settings.

    Raises:
        UnknownKey: with the nearest key.
        InvalidValue: the key names a group of settings.
    """
    known = list(keys(schema))
    for key in space:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise UnknownKey(f"Unknown key {key!r} in {where}: {schema.__name__} has no such setting. {hint}")
        if any(other.startswith(f"{key}.") for other in known):
            raise InvalidValue(f"{key!r} in {where} is a group of settings. Search over one of them, e.g. {key}.<name>.")


def assign(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set."""
    result: dict[str, Any] = {key: assign(value, {}) if isinstance(value, Mapping) else value for key, value in tree.items()}
    for dotted, value in values.items():
        node = result
        *groups, leaf = dotted.split(".")
        for group in groups:
            if not isinstance(node.get(group), dict):
                node[group] = {}
            node = node[group]
        node[leaf] = value
    return result


def bounds(distribution: Uniform | LogUniform | Integer | Choice) -> tuple[Value, ...]:
    """The extreme values, which must be valid settings before a sweep starts."""
    return distribution.values if isinstance(distribution, Choice) else (distribution.low, distribution.high)


def distributions(space: Mapping[str, Uniform | LogUniform | Integer | Choice]) -> dict[str, Any]:
    """The space in Optuna's terms."""
    from optuna import distributions as optuna

    made: dict[str, Any] = {}
    for key, chosen in space.items():
        match chosen:
            case Uniform():
                made[key] = optuna.FloatDistribution(chosen.low, chosen.high, step=chosen.step)
            case LogUniform():
                made[key] = optuna.FloatDistribution(chosen.low, chosen.high, log=True)
            case Integer():
                made[key] = optuna.IntDistribution(chosen.low, chosen.high, log=chosen.log)
            case Choice():
                made[key] = optuna.CategoricalDistribution(chosen.values)
    return made
