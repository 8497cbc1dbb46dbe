"""How sure one can be that a dialogue is bad: logistic regression over `features`, and over hashed n-grams once a user has marked rows.

The shipped model, `quality.json`, is `fit(*marked_dialogues("train"))`: figures only, so that it holds outside the bank. A model that
is trained on marks also sees the words. Scikit-learn fits; a fitted model is plain numbers in a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1ray.data.clean.features import NAMES, features, last_exchange
from r1ray.errors import InvalidValue
from r1ray.types import Conversation

__all__ = ["QualityModel", "fit", "load", "shipped"]

_SHIPPED = Path(__file__).parent / "quality.json"
_NUM_BUCKETS = 2**14
_LOOKED_AT = 1500

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityModel:
    """`ngrams` weighs the hashed n-grams of question and answer; empty where only the figures count."""

    mean: F64
    scale: F64
    weights: F64
    bias: float
    ngrams: F64

    def badness(self, conversations: Sequence[Conversation]) -> F64:
        """Probability in [0, 1] that each dialogue is bad."""
        if not conversations:
            return np.zeros(0)
        logits = (features(conversations) - self.mean) / self.scale @ self.weights + self.bias
        if len(self.ngrams):
            logits = logits + _hashed(conversations) @ self.ngrams
        result: F64 = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        return result

    def save(self, path: Path) -> None:
        used = np.flatnonzero(self.ngrams)
        tree = {
            "features": list(NAMES),
            "mean": _rounded(self.mean),
            "scale": _rounded(self.scale),
            "weights": _rounded(self.weights),
            "bias": round(self.bias, 6),
            "ngrams": {str(bucket): round(float(self.ngrams[bucket]), 5) for bucket in used},
        }
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")


def load(path: Path) -> QualityModel:
    """A model that `save` wrote.

    Raises:
        InvalidValue: there is none, or it was made for other figures.
    """
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if tree["features"] != list(NAMES):
            raise InvalidValue(f"The quality model {path} was made for other features. Train it again: set clean.quality.marks.")
        ngrams = np.zeros(_NUM_BUCKETS if tree["ngrams"] else 0)
        for bucket, weight in tree["ngrams"].items():
            ngrams[int(bucket)] = weight
        mean, scale, weights = (np.array(tree[name], np.float64) for name in ("mean", "scale", "weights"))
        return QualityModel(mean=mean, scale=scale, weights=weights, bias=float(tree["bias"]), ngrams=ngrams)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValue(f"{path} is no quality model: {error}. Set clean.quality.model to a file that this job wrote.") from error


def shipped() -> QualityModel:
    """The default."""
    return load(_SHIPPED)


def fit(conversations: Sequence[Conversation], is_bad: Sequence[bool], *, with_ngrams: bool = False) -> QualityModel:
    """A model of these marks; both kinds must be there."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    figures = features(conversations)
    mean, scale = figures.mean(axis=0), np.maximum(figures.std(axis=0), 1e-3)
    columns: Any = (figures - mean) / scale
    if with_ngrams:
        columns = hstack([csr_matrix(columns), _hashed(conversations)]).tocsr()
    model = LogisticRegression(C=1.0, max_iter=2000).fit(columns, np.asarray(is_bad, int))
    weights = model.coef_[0]
    return QualityModel(
        mean=mean, scale=scale, weights=weights[: len(NAMES)], bias=float(model.intercept_[0]), ngrams=weights[len(NAMES) :].copy()
    )


def _hashed(conversations: Sequence[Conversation]) -> Any:
    """(rows, 16384) sparse, each row of length 1: character n-grams of the last question and answer."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(analyzer="char", ngram_range=(2, 3), n_features=_NUM_BUCKETS, alternate_sign=False)
    return vectorizer.transform("\n\t".join(text[:_LOOKED_AT] for text in last_exchange(c)) for c in conversations)


def _rounded(values: F64) -> list[float]:
    return [round(float(value), 6) for value in values]
