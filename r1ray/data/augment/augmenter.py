"""Which rows each operation is tried on, and how many made rows there may be. Knows no file.

Shares are scaled down together when they would make more than `max_share` of the result; the cap itself is kept to the row.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from r1ray.data.augment.config import AugmentConfig, OperationConfig, TreesConfig
from r1ray.data.augment.masked import MaskedParaphrase
from r1ray.data.augment.provenance import Made
from r1ray.data.augment.rules import EntityPools, Operator, ReplaceEntities, ReplaceSynonyms, VarySyntax
from r1ray.data.augment.served import BackTranslation, Rewriting
from r1ray.data.augment.traps import LogicTraps
from r1ray.data.augment.trees import DialogueTrees
from r1ray.data.balance import draw
from r1ray.types import Conversation

__all__ = ["Augmenter"]

_log = logging.getLogger(__name__)


class Augmenter:
    """Every operation of the config, over a set of known size. `made` counts rows by operation, `failed` tries that gave none."""

    def __init__(self, config: AugmentConfig, *, seed: int, pools: EntityPools) -> None:
        self._config = config
        self._seed = seed
        self._operators = [(o.share, _operator(o, seed, pools)) for o in config.operations if not isinstance(o, TreesConfig)]
        self._trees = [DialogueTrees(o, seed) for o in config.operations if isinstance(o, TreesConfig)]
        self._scale = 1.0
        self._left = 0
        self.made: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def plan(self, num_rows: int, num_others: int) -> int:
        """How many rows may be made of `num_rows` domain rows beside `num_others`: sets the cap, to be called once."""
        wanted = sum(share for share, _ in self._operators) * num_rows + self._num_trees()
        cap = int((num_rows + num_others) * self._config.max_share / (1 - self._config.max_share))
        self._left = cap
        if wanted > cap:
            self._scale = cap / wanted
            _log.warning(
                "augment: its operations would make %d rows, more than max_share=%g of the result; all shares are scaled by %.3f",
                wanted,
                self._config.max_share,
                self._scale,
            )
        return min(round(wanted), cap)

    def augment(self, rows: Sequence[Conversation]) -> Iterator[Made]:
        """Made rows for the rows of one batch; each operation is tried on its drawn share of them."""
        for number, (share, operator) in enumerate(self._operators):
            drawn = [row for row in rows if draw(self._seed, f"augment {number}", row.id) < share * self._scale]
            if not drawn or self._left <= 0:
                continue
            for made in operator.apply(drawn):
                if made is None:
                    self.failed[operator.name] += 1
                elif self._left > 0:
                    yield made

    def grown(self) -> Iterator[Made]:
        """The rows of the dialogue trees, as many as their scaled share allows."""
        for trees in self._trees:
            rows = list(trees.made())
            for made in rows[: round(len(rows) * self._scale)]:
                if self._left > 0:
                    yield made

    def count(self, made: Made) -> None:
        """A made row was taken into the set."""
        self.made[made.operations[-1].name] += 1
        self._left -= 1

    def _num_trees(self) -> int:
        return sum(sum(1 for _ in trees.made()) for trees in self._trees)


def _operator(config: OperationConfig, seed: int, pools: EntityPools) -> Operator:
    """The operation of a config; those that draw values share the pools of the set."""
    make: dict[str, Callable[[Any], Operator]] = {
        "synonyms": lambda c: ReplaceSynonyms(c, seed),
        "entities": lambda c: ReplaceEntities(c, seed, pools),
        "syntax": lambda c: VarySyntax(c, seed),
        "masked": lambda c: MaskedParaphrase(c, seed),
        "back_translation": lambda c: BackTranslation(c, seed),
        "rewrite": lambda c: Rewriting(c, seed),
        "traps": lambda c: LogicTraps(c, seed, pools),
    }
    return make[config.type](config)
