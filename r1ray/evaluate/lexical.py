"""ROUGE-L over words, with jieba's for Chinese: the package's own tokenizer keeps Latin letters only and scores Chinese as 0.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; the F-measure of the longest common subsequence.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from r1ray.evaluate.answer import normal_text
from r1ray.evaluate.shares import Share

__all__ = ["rouge_l", "words"]


def rouge_l(answer: str, gold: str) -> Share:
    """F-measure between 0 and 1."""
    return Share(float(_scorer().score(gold, answer)["rougeL"].fmeasure), 1.0)


def words(text: str) -> list[str]:
    """Normalised words: Chinese as jieba cuts it, the rest at spaces; no punctuation."""
    jieba = _jieba()
    return [word for word in jieba.cut(normal_text(text)) if not word.isspace()]


class _Words:
    """The tokenizer object that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@functools.cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it announces its dictionary on stderr
    return jieba
