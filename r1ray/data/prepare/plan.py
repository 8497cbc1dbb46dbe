"""How training should draw from a prepared set: written into the Parquet file's metadata, read back as a walk over its rows.

walk = Walk(Path("train.parquet"), batch_size=16, seed=0)
walk.batch()                 # sixteen row numbers of the file
saved = walk.position()      # plain JSON, for Walk.resume
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq

from r1ray.data.mix import Mixture, ShortSamples, Stage
from r1ray.data.prepare.config import MixConfig
from r1ray.errors import UnknownFormat

__all__ = ["MIX_KEY", "Mix", "MixPlan", "Walk", "mix_plan", "read_mix", "stored_mix"]

MIX_KEY = "r1ray.mix"
"""Of the file metadata: where the plan is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixPlan:
    """`stages` as in `mix`; rows of at most `short_chars` are `short_share` of a batch, None: as they come."""

    stages: tuple[Stage, ...]
    short_share: float | None
    short_chars: int

    def metadata(self) -> dict[str, str]:
        """Key and value for the file's metadata."""
        return {MIX_KEY: json.dumps(asdict(self))}


def mix_plan(config: MixConfig, median_chars: int) -> MixPlan:
    """The config's stages; without any one stage, in which history has what domain and out-of-domain rows leave."""
    if config.stages is not None:
        stages: tuple[Stage, ...] = tuple((step, dict(weights.items())) for step, weights in config.stages)
    else:
        rest = 1 - config.domain_share
        others = min(config.out_of_domain_share, rest)
        stages = ((0, {"domain": config.domain_share, "out_of_domain": others, "history": rest - others}),)
    return MixPlan(stages=stages, short_share=config.short_share, short_chars=config.short_chars or median_chars)


class Walk:
    """Row numbers of a prepared file in the order that its plan draws them."""

    def __init__(self, path: Path, *, batch_size: int, seed: int) -> None:
        plan = _plan(path)
        table = pq.read_table(path, columns=["role", "chars"])
        roles, chars = np.array(table["role"].to_pylist()), table["chars"].to_numpy()
        self._rows = {str(role): np.flatnonzero(roles == role) for role in np.unique(roles)}
        lengths = {role: chars[rows] for role, rows in self._rows.items()}
        short = None if plan.short_share is None else ShortSamples(lengths=lengths, longest=plan.short_chars, share=plan.short_share)
        sizes = {role: len(rows) for role, rows in self._rows.items()}
        self._mixture = Mixture(stages=plan.stages, sources=sizes, batch_size=batch_size, seed=seed, short=short)

    def batch(self) -> list[int]:
        """The rows of the next step."""
        return [int(self._rows[role][row]) for role, row in self._mixture.batch()]

    def position(self) -> dict[str, Any]:
        return self._mixture.position()

    def resume(self, position: Mapping[str, Any]) -> Self:
        """Go on where `position` was taken."""
        self._mixture.resume(position)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A prepared file's plan as it is stored, and what each of its dialogues counts as: id -> (role, characters)."""

    stored: str
    rows: Mapping[str, tuple[str, int]]

    def columns(self, ids: Sequence[str]) -> dict[str, list[Any]]:
        """`role` and `chars` of those dialogues, for a file that `Walk` can read."""
        found = [self.rows[name] for name in ids]
        return {"role": [role for role, _ in found], "chars": [chars for _, chars in found]}

    def metadata(self) -> dict[str, str]:
        return {MIX_KEY: self.stored}


def read_mix(path: Path) -> Mix | None:
    """The mix of the Parquet file at `path`; None for any other file and for a directory."""
    stored = stored_mix(path)
    if stored is None:
        return None
    table = pq.read_table(path, columns=["conversation_id", "role", "chars"])
    names, roles, chars = (table[name].to_pylist() for name in ("conversation_id", "role", "chars"))
    return Mix(stored=stored, rows={name: (str(role), int(num)) for name, role, num in zip(names, roles, chars, strict=True)})


def stored_mix(path: Path) -> str | None:
    """The plan in the metadata of the Parquet file at `path`, as it stands there; None for any other file and for a directory."""
    if path.suffix != ".parquet" or not path.is_file():
        return None
    stored = (pq.read_metadata(path).metadata or {}).get(MIX_KEY.encode())
    return None if stored is None else stored.decode()


def _plan(path: Path) -> MixPlan:
    stored = (pq.read_metadata(path).metadata or {}).get(MIX_KEY.encode())
    if stored is None:
        raise UnknownFormat(f"{path} has no mix plan: it was not written by jobs/prepare_data.py. Prepare it first.")
    tree = json.loads(stored)
    stages = tuple((int(step), dict(weights)) for step, weights in tree["stages"])
    return MixPlan(stages=stages, short_share=tree["short_share"], short_chars=int(tree["short_chars"]))
