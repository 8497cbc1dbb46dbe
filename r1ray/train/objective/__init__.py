"""What a training minimises, one module per objective; `train.objective` names it.

    objective_of("sft").read(config)          # driver: rows, with their hash
    ....prepare(rows, base, config, cache)    # driver: tokenised once, cached
    ....trainer(bench)                        # worker: TRL's trainer over this rank's share

A module has no torch at import, so that a mistake in a config shows before anything heavy is loaded; its trainer is a module beside it.
"""

from __future__ import annotations

from importlib import import_module

from r1ray.train.objective.base import Objective

__all__ = ["OBJECTIVES", "objective_of"]

OBJECTIVES = {"sft": "Supervised", "dpo": "Preferences", "reward": "Rewards", "grpo": "Groups", "distill": "Distilled"}
"""`train.objective` -> the class in the module of that name."""


def objective_of(name: str) -> Objective:
    """The objective called `name`."""
    found: Objective = getattr(import_module(f"r1ray.train.objective.{name}"), OBJECTIVES[name])()
    return found
