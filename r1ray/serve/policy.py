"""Which sampling settings a request gets: the version's default, over it the task's, over that the request's own fields."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from r1ray.serve.faults import bad_request
from r1ray.types import Sampling, SamplingPolicy

__all__ = ["resolve", "validate"]


def resolve(policy: SamplingPolicy | None, task: str | None, overrides: Mapping[str, Any]) -> Sampling:
    """The settings in force. A task that the policy does not know falls back to the default, since clients share task names.

    Raises:
        Refused: a field outside its limits (400).
    """
    base = Sampling() if policy is None else policy.tasks.get(task or "", policy.default)
    return _checked(base.model_dump() | dict(overrides))


def validate(overrides: Mapping[str, Any]) -> None:
    """Raises Refused (400) for a field outside its limits, before anything is sent to a replica."""
    _checked(dict(overrides))


def _checked(fields: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else None
        raise bad_request(f"{name}: {problem['msg']} (got {reprlib.repr(problem.get('input'))}).", param=name) from error
