"""MinHash signatures of many texts at once: the share of equal numbers estimates the Jaccard similarity of the shingle sets.

A. Broder, "On the resemblance and containment of documents", 1997. A shingle is n consecutive characters of the normalised text.
Stored signatures keep 8 bits per number (P. Li and A. C. König, "b-Bit Minwise Hashing", 2010): a quarter of the memory.

Shapes: N texts, K hashes, S shingles of all texts together.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["mixed", "normalised", "short", "signatures", "similarity"]

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_BITS = 8
_SEED = 20260101  # of the permutations; fixed, so that runs compare
_BASE = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=4096)  # a row's turns are normalised for several keys
def normalised(text: str) -> str:
    """Equal for texts that differ in case, blanks and character width only."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def signatures(texts: Sequence[str], *, num_hashes: int, shingle: int) -> U32:
    """(N, K) minima over each text's shingles; a text shorter than a shingle is one shingle."""
    if not texts:
        return np.empty((0, num_hashes), np.uint32)
    padded = [text.ljust(shingle, "\0") for text in texts]
    lengths_N = np.fromiter((len(text) for text in padded), np.int64, len(padded))
    hashes_S, starts_N = _shingles("".join(padded), lengths_N, shingle)
    factors, offsets = _permutations(num_hashes)
    signature_KN = np.empty((num_hashes, len(texts)), np.uint32)
    permuted_S = np.empty_like(hashes_S)
    for number in range(num_hashes):
        np.multiply(hashes_S, factors[number], out=permuted_S)
        permuted_S += offsets[number]
        np.minimum.reduceat(permuted_S, starts_N, out=signature_KN[number])
    return np.ascontiguousarray(signature_KN.T)


def short(signature: U32) -> U8:
    """The low bits of a signature: what is stored. High bits of a minimum are nearly always 0 and would all agree."""
    return (signature & np.uint32((1 << _BITS) - 1)).astype(np.uint8)


def similarity(left: U8, right: U8) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of stored signatures, row by row; corrected for numbers that agree by chance."""
    by_chance = 2.0**-_BITS
    equal: npt.NDArray[np.float64] = (left == right).mean(axis=-1)
    return np.maximum((equal - by_chance) / (1 - by_chance), 0.0)


def _shingles(text: str, lengths_N: npt.NDArray[np.int64], shingle: int) -> tuple[U32, npt.NDArray[np.int64]]:
    """A hash for each shingle that lies in one text, and where each text's begin."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    rolled = np.zeros(len(codes) - shingle + 1, np.uint64)
    for place in range(shingle):
        rolled *= _BASE
        rolled += codes[place : len(codes) - shingle + 1 + place]
    inside = np.ones(len(codes), bool)
    ends = np.cumsum(lengths_N)
    for back in range(1, shingle):
        inside[ends - back] = False
    starts_N = np.concatenate(([0], np.cumsum(lengths_N - shingle + 1)[:-1]))
    return mixed(rolled[inside[: len(rolled)]]), starts_N


def mixed(values: U64) -> U32:
    """murmur3's finaliser: every input bit changes half of the output bits."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    return (values >> np.uint64(32)).astype(np.uint32)


def _permutations(num_hashes: int) -> tuple[U32, U32]:
    """x -> a x + b modulo 2^32 with odd a: bijections, whose high bits decide a minimum."""
    random = np.random.default_rng(_SEED)
    factors = random.integers(0, 2**32, num_hashes, dtype=np.uint32) | np.uint32(1)
    return factors, random.integers(0, 2**32, num_hashes, dtype=np.uint32)
