"""How different the questions of a set are: distinct-n (J. Li et al. 2016) and the spread of their embeddings. Knows no model.

distinct-n is the share of different n-grams among all, words in Latin text and characters in Chinese. The spread is 1 minus the mean
cosine of all pairs: 0 where all questions are one, near 1 where they have nothing in common. It depends on the embedder: compare it
before and after, not between embedders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from r1ray.data.clean.minhash import mixed, normalised

__all__ = ["Embedder", "distinct", "diversity", "hashed_ngrams", "spread"]

Embedder = Callable[[Sequence[str]], npt.NDArray[np.float32]]

_TOKEN = re.compile(r"[\u3400-\u9fff]|[a-z0-9]+")
_WIDTH = 512


def diversity(questions: Sequence[str], embed: Embedder | None = None) -> dict[str, float]:
    """distinct_1, distinct_2, distinct_3 and spread of these questions."""
    if len(questions) < 2:
        return {}
    figures = {f"distinct_{n}": distinct(questions, n) for n in (1, 2, 3)}
    return {**figures, "spread": spread((embed or hashed_ngrams)(questions))}


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams; 0 when there is none."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        tokens = _TOKEN.findall(normalised(text))
        grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def spread(vectors: npt.NDArray[np.float32]) -> float:
    """1 - mean cosine over all pairs of rows, from the length of their sum: linear in the rows."""
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    num = len(units)
    total = units.sum(axis=0, dtype=np.float64)
    return float(1 - (total @ total - num) / (num * (num - 1)))


def hashed_ngrams(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """(texts, 512): counts of hashed character trigrams with random signs."""
    vectors = np.zeros((len(texts), _WIDTH), np.float32)
    for row, text in enumerate(texts):
        codes = np.frombuffer(normalised(text).ljust(3).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        grams = mixed((codes[:-2] << np.uint64(42)) ^ (codes[1:-1] << np.uint64(21)) ^ codes[2:])
        np.add.at(vectors[row], grams % _WIDTH, np.where(grams & np.uint32(1 << 31), 1.0, -1.0).astype(np.float32))
    return vectors
