"""Is a setting better than the baseline, or do these examples only make it look so? Knows neither Ray nor what the metrics are.

Quality is the mean of metrics, each a quotient of sums over examples. All settings answered the same examples, so the examples are
resampled for all of them together (paired bootstrap): how a difference varies then holds the choice of examples and the luck of the draw
within each answer, and leaves out that some examples are hard for every setting.

Many settings are compared at once, and the best of many looks good by luck alone. So the lower bounds hold for all of them together
(the largest studentised difference of a resample decides, max-t: Westfall and Young, Resampling-Based Multiple Testing, 1993).

Shapes: B resamples, N examples, S settings, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Gain", "gains"]

_NUM_RESAMPLES = 2000
_CHUNK_NUMBERS = 1 << 24  # counts in memory at a time: 128 MiB

Floats = npt.NDArray[np.float64]
Shares = Mapping[str, Sequence[Sequence[float]]]
"""Metric -> (numerator, denominator) of each example, in the order of the examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A setting's quality against the baseline's. `at_least` is the lower bound that all settings keep together."""

    quality_se: float
    gain: float
    gain_se: float
    at_least: float


def gains(shares: Sequence[Shares], baseline: int, *, confidence: float, seed: int) -> list[Gain]:
    """One per setting; the baseline's own is 0 all over. Metrics that a setting lacks are left out for all.

    Raises:
        ValueError: no metric is common to all settings.
    """
    shares_NSM2 = _stacked(shares)
    quality_S = _quality(shares_NSM2.sum(axis=0)[None])[0]
    drawn_BS = _resampled(shares_NSM2, seed)
    gain_S = quality_S - quality_S[baseline]
    drawn_gain_BS = drawn_BS - drawn_BS[:, [baseline]]
    se_S = _deviation(drawn_gain_BS)
    at_least_S = gain_S - _critical(drawn_gain_BS - gain_S, se_S, confidence) * se_S
    columns = zip(_deviation(drawn_BS), gain_S, se_S, at_least_S, strict=True)
    return [Gain(quality_se=float(q), gain=float(g), gain_se=float(s), at_least=float(a)) for q, g, s, a in columns]


def _stacked(shares: Sequence[Shares]) -> Floats:
    names = [name for name in shares[0] if all(name in each for each in shares)]
    if not names:
        raise ValueError("the settings have no metric in common")
    return np.array([[each[name] for name in names] for each in shares], dtype=np.float64).transpose(2, 0, 1, 3)


def _resampled(shares_NSM2: Floats, seed: int) -> Floats:
    """Quality of every setting on each resample; resamples in which a metric counts nothing are left out."""
    num, *shape = shares_NSM2.shape
    flat = shares_NSM2.reshape(num, -1)
    rng = np.random.default_rng(seed)
    found = []
    rows = max(1, _CHUNK_NUMBERS // num)
    for start in range(0, _NUM_RESAMPLES, rows):
        counts_BN = np.stack(
            [np.bincount(rng.integers(num, size=num), minlength=num) for _ in range(min(rows, _NUM_RESAMPLES - start))]
        ).astype(np.float64)
        found.append(_quality((counts_BN @ flat).reshape(-1, *shape)))
    drawn = np.concatenate(found)
    return drawn[np.isfinite(drawn).all(axis=1)]


def _quality(sums_BSM2: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        quality_BS: Floats = (sums_BSM2[..., 0] / sums_BSM2[..., 1]).mean(axis=-1)
    return quality_BS


def _deviation(drawn_BS: Floats) -> Floats:
    """Of each setting over the resamples; what is only rounding is 0, so that equal answers differ by nothing."""
    deviation_S: Floats = drawn_BS.std(axis=0, ddof=1) if len(drawn_BS) > 1 else np.full(drawn_BS.shape[1], np.inf)
    return np.where(deviation_S < 1e-12, 0.0, deviation_S)


def _critical(errors_BS: Floats, se_S: Floats, confidence: float) -> float:
    """So many standard errors bound the largest luck among the settings, in this share of the resamples."""
    varies = np.isfinite(se_S) & (se_S > 0)
    if not varies.any():
        return 0.0 if np.isfinite(se_S).all() else 1.0
    return float(np.quantile((errors_BS[:, varies] / se_S[varies]).max(axis=1), confidence))
