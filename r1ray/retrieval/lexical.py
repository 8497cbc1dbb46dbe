"""BM25 over words: jieba cuts Chinese, English is lower-cased words without the plural s. Knows ranks and scores, not passages.

A Chinese word also counts by its characters (开户 finds 户头): measured in docs/retrieval.md.

Document numbers are positions in the list that was indexed, which is the row order of the vector table beside it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Lexical", "words"]

_WORD = re.compile(r"\w")
# So frequent in questions that they only add noise to short passages.
_STOP_WORDS = """
    的 了 吗 呢 吧 啊 是 在 我 你 您 他 她 它 们 我们 你们 和 与 就 都 也 请 请问 这 那 有 要 会 能 可以 怎么 什么 怎样 如何
    a an the is are was were be been do does did i you he she it we they my your me to of in on at for and or with
    what how when can could should would please this that there
"""
_STOP = frozenset(_STOP_WORDS.split())


def words(text: str) -> list[str]:
    """The tokens of a text; full-width letters and digits are made half-width first."""
    normal = unicodedata.normalize("NFKC", text).lower()
    found = [_singular(word) for word in _jieba().cut_for_search(normal) if _WORD.search(word) and word not in _STOP]
    return found + [character for word in found if len(word) > 1 and not word.isascii() for character in word]


def _singular(word: str) -> str:
    return word[:-1] if word.isascii() and len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


class Lexical:
    """A BM25 index in memory, saved as a directory of arrays."""

    def __init__(self, index: Any, num_documents: int) -> None:
        self._index = index
        self.num_documents = num_documents

    @classmethod
    def build(cls, texts: Sequence[str]) -> Lexical:
        import bm25s

        index = bm25s.BM25()
        # A text of stop words only still needs its row.
        index.index([words(text) or ["∅"] for text in texts], show_progress=False)
        return cls(index, len(texts))

    @classmethod
    def load(cls, directory: Path, num_documents: int) -> Lexical:
        import bm25s

        return cls(bm25s.BM25.load(str(directory), show_progress=False), num_documents)

    def save(self, directory: Path) -> None:
        self._index.save(str(directory), show_progress=False)

    def rank(self, query: str, k: int) -> list[int]:
        """Document numbers by falling score, only those that share a word with the query."""
        tokens = words(query)
        if not tokens:
            return []
        scores = np.asarray(self._index.get_scores(tokens))
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(i) for i in order if scores[i] > 0]


@cache
def _jieba() -> Any:
    """jieba with its dictionary loaded, silently (about a second, once per process)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return jieba
