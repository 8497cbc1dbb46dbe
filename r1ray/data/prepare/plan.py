"""How training should draw from a prepared set: written into the Parquet file's metadata, read back as a walk over its rows.

walk = Walk(Path("train.parquet"), batch_size=16, seed=0)
walk.batch()                 # sixteen row numbers of the file
saved = walk.position()      # plain JSON, for Walk.resume
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.data.mix import Mixture, ShortSamples, Stage
from r1ray.data.prepare.config import MixConfig
from r1ray.errors import InvalidValue, UnknownFormat

__all__ = ["MIX_KEY", "Coverage", "Mix", "MixPlan", "Walk", "coverage", "mix_plan", "read_mix", "stored_mix"]

T = TypeVar("T")
_log = logging.getLogger(__name__)

MIX_KEY = "r1ray.mix"
"""Of the file metadata: where the plan is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixPlan:
    """`stages` as in `mix`; `short_share` of a batch are short, None: as they come. Short are rows of at most `short_chars`, None: the
    `short_share` shortest of each role. `drawn_from` names the rows' roles: the same dialogues in other roles are another plan.
    """

    stages: tuple[Stage, ...]
    short_share: float | None
    short_chars: int | None
    drawn_from: str = ""

    def metadata(self) -> dict[str, str]:
        """Key and value for the file's metadata."""
        return {MIX_KEY: json.dumps(asdict(self))}


def mix_plan(config: MixConfig, drawn_from: str = "") -> MixPlan:
    """The config's stages; without any one stage, in which history has what domain and out-of-domain rows leave."""
    if config.stages is not None:
        stages: tuple[Stage, ...] = tuple((step, dict(weights.items())) for step, weights in config.stages)
    else:
        rest = 1 - config.domain_share
        others = min(config.out_of_domain_share, rest)
        stages = ((0, {"domain": config.domain_share, "out_of_domain": others, "history": rest - others}),)
    return MixPlan(stages=stages, short_share=config.short_share, short_chars=config.short_chars, drawn_from=drawn_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many rows were drawn never, and how many more than once."""

    num_rows: int
    num_missed: int
    num_repeated: int

    @property
    def told(self) -> str:
        """With what to do about rows that never come."""
        found = f"{self.num_missed:,} of {self.num_rows:,} rows will not be drawn, {self.num_repeated:,} more than once"
        if not self.num_missed:
            return found
        return (
            f"{found}. mix.short_share=null in the preparation takes lengths as they come, mix.domain_share and mix.stages set the shares "
            "of roles; train.mix=false draws every row once an epoch"
        )


def coverage(drawn: npt.NDArray[np.int64], num_rows: int) -> Coverage:
    """Of `num_rows` rows by the row numbers that were drawn."""
    times = np.bincount(drawn, minlength=num_rows)
    return Coverage(num_rows=num_rows, num_missed=int((times == 0).sum()), num_repeated=int((times > 1).sum()))


class Walk:
    """Row numbers of a prepared file in the order that its plan draws them; of some of its `rows`, these are counted from 0."""

    def __init__(self, path: Path, *, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> None:
        plan = _plan(path)
        table = pq.read_table(path, columns=["role", "chars"])
        if rows is not None:
            table = table.take(pa.array(np.asarray(rows, np.int64)))
        chars = table["chars"].to_numpy()
        roles = sorted(pc.unique(table["role"]).to_pylist())
        self._rows = {role: np.flatnonzero(pc.equal(table["role"], role).to_numpy()) for role in roles}
        lengths = {role: chars[numbers] for role, numbers in self._rows.items()}
        self._short = None if plan.short_share is None else ShortSamples(lengths=lengths, share=plan.short_share, longest=plan.short_chars)
        sizes = {role: len(numbers) for role, numbers in self._rows.items()}
        self.kinds = self._kinds()
        """Of each row a number for its role and whether it is short: rows of one kind may stand for each other in the plan."""
        self._mixture = Mixture(stages=plan.stages, sources=sizes, batch_size=batch_size, seed=seed, short=self._short)

    @property
    def short_chars(self) -> dict[str, int]:
        """The longest short row of each role that has one."""
        if self._short is None:
            return {}
        found = {role: np.asarray(chars)[self._short.are_short(role, len(chars))] for role, chars in self._short.lengths.items()}
        return {role: int(chars.max()) for role, chars in found.items() if len(chars)}

    def _kinds(self) -> npt.NDArray[np.int32]:
        found = np.empty(sum(len(numbers) for numbers in self._rows.values()), np.int32)
        for place, (role, numbers) in enumerate(self._rows.items()):
            found[numbers] = 2 * place
            if self._short is not None:
                found[numbers] += self._short.are_short(role, len(numbers))
        return found

    def batch(self) -> list[int]:
        """The rows of the next step.

        Raises:
            InvalidValue: the plan wants only roles of which there is no row.
        """
        return [self._number(draw) for draw in self._drawn(self._mixture.batch)]

    def take(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The next rows, whatever steps they belong to. Raises what `batch` raises."""
        return np.fromiter((self._number(self._drawn(self._mixture.__next__)) for _ in range(num_rows)), np.int64, num_rows)

    def position(self) -> dict[str, Any]:
        return self._mixture.position()

    def resume(self, position: Mapping[str, Any]) -> Self:
        """Go on where `position` was taken."""
        self._mixture.resume(position)
        return self

    def _number(self, draw: tuple[str, int]) -> int:
        role, row = draw
        return int(self._rows[role][row])

    def _drawn(self, draw: Callable[[], T]) -> T:
        try:
            return draw()
        except ValueError as error:
            raise InvalidValue(
                f"The mix plan cannot go on: {error}. Set train.mix=false, or prepare the file with other sources, mix.domain_share or "
                "mix.stages."
            ) from error


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
    found: dict[str, tuple[str, int]] = {}
    for name, role, num in zip(names, roles, chars, strict=True):
        found.setdefault(name, (str(role), int(num)))  # as the reader does, which refuses a second row of that name
    return Mix(stored=stored, rows=found)


def stored_mix(path: Path) -> str | None:
    """The plan in the metadata of the Parquet file at `path`; None for any other file and for a directory.

    As it stands there, but for a file that was prepared before plans named their rows' roles (`drawn_from`): such a plan holds the median
    length where nobody had said what is short, which draws some rows twice and others never. There the shortest of each role are short.
    """
    if path.suffix != ".parquet" or not path.is_file():
        return None
    stored = (pq.read_metadata(path).metadata or {}).get(MIX_KEY.encode())
    return None if stored is None else _without_median(stored.decode(), path)


def _without_median(stored: str, path: Path) -> str:
    tree = json.loads(stored)
    if "drawn_from" in tree or tree["short_chars"] is None:
        return stored
    chars = pq.read_table(path, columns=["chars"])["chars"].to_numpy()
    if not len(chars) or tree["short_chars"] != int(np.median(chars)):
        return stored  # somebody has set it
    _log.info("%s is of before: its shortest rows of each role are short instead of those up to the median", path)
    return json.dumps(tree | {"short_chars": None})


def _plan(path: Path) -> MixPlan:
    stored = stored_mix(path)
    if stored is None:
        raise UnknownFormat(f"{path} has no mix plan: it was not written by jobs/prepare_data.py. Prepare it first.")
    tree = json.loads(stored)
    stages = tuple((int(step), dict(weights)) for step, weights in tree["stages"])
    return MixPlan(stages=stages, short_share=tree["short_share"], short_chars=tree["short_chars"], drawn_from=tree.get("drawn_from", ""))
