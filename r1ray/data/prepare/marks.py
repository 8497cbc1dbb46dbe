"""The quality model out of a user's own marks: rows that somebody called good or bad."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r1ray.data.balance import draw
from r1ray.data.clean.quality import QualityModel, fit
from r1ray.data.config import DataConfig
from r1ray.data.prepare.config import QualityConfig
from r1ray.data.read import stream
from r1ray.errors import InvalidValue
from r1ray.settings import Settings
from r1ray.types import Conversation

__all__ = ["train_on_marks"]

_MARKS = {"good": False, "1": False, "true": False, "bad": True, "0": True, "false": True}
_HELD_OUT = 0.2
_FEWEST = 10  # of each kind: below it a held-out figure says nothing
_log = logging.getLogger(__name__)


def train_on_marks(config: QualityConfig, settings: Settings, path: Path, *, seed: int) -> tuple[QualityModel, dict[str, float]]:
    """A model of all marks, saved at `path`, and the figures of one that did not see a fifth of them.

    Raises:
        InvalidValue: a row has no readable mark, or one kind is too rare.
    """
    assert config.marks is not None
    rows, is_bad = _marked(settings.locate(config.marks), config.mark_column)
    fewest = min(sum(is_bad), len(is_bad) - sum(is_bad))
    if fewest < _FEWEST:
        raise InvalidValue(
            f"{config.marks} marks {sum(is_bad)} dialogues bad and {len(is_bad) - sum(is_bad)} good; "
            f"at least {_FEWEST} of each are needed. Mark more, or set clean.quality.marks to null for the shipped model."
        )
    held = np.array([draw(seed, "marks", row.id) < _HELD_OUT for row in rows])
    figures = _figures(rows, np.array(is_bad), held, config.threshold)
    model = fit(rows, is_bad, with_ngrams=True)
    model.save(path)
    _log.info("quality model trained on %d marks, held-out figures %s", len(rows), figures)
    return model, {"marks": float(len(rows)), **figures}


def _figures(rows: list[Conversation], is_bad: Any, held: Any, threshold: float) -> dict[str, float]:
    """Of the held-out fifth: share of the bad that the threshold drops, share of the good that it drops, area under the ROC curve."""
    seen, unseen = np.flatnonzero(~held), np.flatnonzero(held)
    if len(set(is_bad[seen])) < 2 or len(set(is_bad[unseen])) < 2:
        return {}
    from sklearn.metrics import roc_auc_score

    model = fit([rows[place] for place in seen], list(is_bad[seen]), with_ngrams=True)
    badness = model.badness([rows[place] for place in unseen])
    truth = is_bad[unseen]
    return {
        "held_out_bad_dropped": round(float((badness[truth] >= threshold).mean()), 4),
        "held_out_good_dropped": round(float((badness[~truth] >= threshold).mean()), 4),
        "held_out_auc": round(float(roc_auc_score(truth, badness)), 4),
    }


def _marked(path: Path, column: str) -> tuple[list[Conversation], list[bool]]:
    rows: list[Conversation] = []
    is_bad: list[bool] = []
    for row in stream(DataConfig(path=path, role_order="repair")):
        mark = _mark(row.raw.values, column)
        if mark is None:
            raise InvalidValue(
                f"{row.raw.file}:{row.raw.row} has {row.raw.values.get(column)!r} in the column {column!r}. "
                "Mark every row good or bad, or set clean.quality.mark_column."
            )
        if row.conversation is not None:
            rows.append(row.conversation)
            is_bad.append(mark)
    return rows, is_bad


def _mark(values: Mapping[str, Any], column: str) -> bool | None:
    return _MARKS.get(str(values.get(column)).strip().lower())
