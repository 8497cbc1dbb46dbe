"""Between the passes: which of the kept rows go after all, now that the whole set is known. Looks at columns of numbers, at no text.

In order: contradictions, the ratio of classes, the cap per intent, the share of history that is replayed, the share out of domain.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from r1ray.data.balance import beyond_cap, beyond_ratio, beyond_share, draw
from r1ray.data.clean.contradictions import Conflict
from r1ray.data.prepare.cleaning import Places, answer_key, question_key
from r1ray.data.prepare.config import BalanceConfig, MixConfig, Role
from r1ray.data.prepare.rows import KeptRow
from r1ray.data.split import intent_of

__all__ = ["Columns", "Selection"]

_ROLES: tuple[Role, ...] = ("domain", "out_of_domain", "history")
_log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


class Columns:
    """What is remembered of each kept row: 43 bytes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._questions, self._answers = array("Q"), array("Q")
        self._labels, self._roles, self._draws = array("q"), array("B"), array("d")
        self._sources = array("H")
        self._names: list[str] = []
        self.places = Places()
        self.intents: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._roles)

    def add(self, rows: Sequence[KeptRow], source: str) -> None:
        if source not in self._names:
            self._names.append(source)
        self._sources.extend([self._names.index(source)] * len(rows))
        self.places.extend(rows)
        for row in rows:
            self._add(row)

    def source(self, row: int) -> str:
        return self._names[self._sources[row]]

    def _add(self, row: KeptRow) -> None:
        intent = intent_of(row.conversation)
        self._questions.append(question_key(row.conversation))
        self._answers.append(answer_key(row.conversation))
        self._labels.append(-1 if intent is None else self.intents.setdefault(intent, len(self.intents)))
        self._roles.append(_ROLES.index(row.role))
        self._draws.append(draw(self._seed, "select", row.conversation.id))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.array(self._labels, np.int64)

    @property
    def draws(self) -> npt.NDArray[np.float64]:
        return np.array(self._draws, np.float64)

    def of_role(self, role: Role) -> Mask:
        mask: Mask = np.array(self._roles, np.uint8) == _ROLES.index(role)
        return mask

    def keys(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        return np.array(self._questions, np.uint64), np.array(self._answers, np.uint64)


class Selection:
    """`reasons[row]` is why the row goes, as (step, reason); rows without one stay."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._labels, self._draws = columns.labels, columns.draws
        self.alive: Mask = np.ones(len(columns), bool)
        self.reasons: dict[int, tuple[str, str]] = {}

    def num(self, role: Role) -> int:
        return int((self.alive & self._columns.of_role(role)).sum())

    def settle(self, conflicts: Mapping[int, Conflict]) -> None:
        """Rows whose answer lost against another answer to the same question."""
        if not conflicts:
            return
        questions, answers = self._columns.keys()
        contested = np.isin(questions, np.fromiter(conflicts, np.uint64, len(conflicts)))
        for row in np.flatnonzero(contested):
            conflict = conflicts[int(questions[row])]
            if conflict.kept is not None and int(answers[row]) == conflict.kept:
                continue
            why = "no answer has a majority" if conflict.kept is None else f"{conflict.num_agreeing} agree on another answer"
            self._drop(int(row), "contradiction", f"{conflict.num_rows} rows ask the same and answer differently; {why}")

    def balance(self, config: BalanceConfig) -> None:
        """Classes first, then the cap: a cap must not be undone by the ratio."""
        if config.negatives:
            known = [self._columns.intents[name] for name in config.negatives if name in self._columns.intents]
            if missing := [name for name in config.negatives if name not in self._columns.intents]:
                _log.warning("balance.negatives: no row has the intent %s", ", ".join(missing))
            negative = np.isin(self._labels, known)
            positive = (self._labels >= 0) & ~negative
            gone = beyond_ratio(negative, positive, self._draws, self.alive, (config.min_negatives, config.max_negatives))
            self._drop_all(gone, "balance", f"beyond {config.min_negatives:g} to {config.max_negatives:g} negatives per positive")
        if config.max_per_intent is not None:
            gone = beyond_cap(self._labels, self._draws, self.alive, config.max_per_intent)
            self._drop_all(gone, "balance", f"its intent has more than {config.max_per_intent} rows")

    def mix(self, config: MixConfig, num_made: int) -> None:
        """History to the share that is replayed; then out-of-domain rows to their share of everything, the made rows included."""
        history = np.flatnonzero(self.alive & self._columns.of_role("history"))
        num_kept = round(config.history_share * len(history))
        self._drop_all(
            beyond_share(history, self._draws, num_kept, len(self.alive)), "mix", f"beyond the {config.history_share:.0%} of history kept"
        )
        others = np.flatnonzero(self.alive & self._columns.of_role("out_of_domain"))
        rest = int(self.alive.sum()) - len(others) + num_made
        share = config.out_of_domain_share
        num_kept = len(others) if share == 1 else min(len(others), int(rest * share / (1 - share)))
        self._drop_all(beyond_share(others, self._draws, num_kept, len(self.alive)), "mix", f"beyond {share:.1%} out-of-domain rows")

    def _drop_all(self, gone: Mask, step: str, reason: str) -> None:
        for row in np.flatnonzero(gone):
            self._drop(int(row), step, reason)

    def _drop(self, row: int, step: str, reason: str) -> None:
        self.alive[row] = False
        self.reasons[row] = step, reason
