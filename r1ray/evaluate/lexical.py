"""ROUGE and BLEU over words, with jieba's for Chinese: rouge-score's own tokenizer keeps Latin letters only and scores Chinese as 0.

ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; F-measures of words, pairs of words and the longest common
subsequence. BLEU: Papineni et al., 2002, of one answer, smoothed as in Lin and Och, 2004.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from r1ray.evaluate.answer import normal_text
from r1ray.evaluate.shares import Share

__all__ = ["bleu", "lexical", "rouge_l", "words"]

_LONGEST = 4  # words of an n-gram in BLEU
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def lexical(answer: str, gold: str) -> dict[str, Share]:
    """Every metric of common words, each between 0 and 1."""
    found = _scorer(*_ROUGE.values()).score(gold, answer)
    rouge = {name: Share(float(found[theirs].fmeasure), 1.0) for name, theirs in _ROUGE.items()}
    return {**rouge, "bleu": bleu(answer, gold)}


def rouge_l(answer: str, gold: str) -> Share:
    """F-measure between 0 and 1."""
    return Share(float(_scorer("rougeL").score(gold, answer)["rougeL"].fmeasure), 1.0)


def bleu(answer: str, gold: str) -> Share:
    """BLEU of one answer: geometric mean of the n-gram precisions, n = 1 to 4, times the brevity penalty.

    Above single words, hits and n-grams count one more each, so that a missing 4-gram does not make all of it 0; an n that the answer is
    too short for is left out, so that equal texts have 1.
    """
    said, wanted = words(answer), words(gold)
    logs = []
    for n in range(1, min(_LONGEST, len(said)) + 1):
        of_answer, of_gold = _ngrams(said, n), _ngrams(wanted, n)
        hits, extra = (of_answer & of_gold).total(), int(n > 1)
        if hits + extra == 0:
            return Share(0.0, 1.0)
        logs.append(math.log((hits + extra) / (of_answer.total() + extra)))
    if not logs:
        return Share(0.0, 1.0)
    brevity = min(0.0, 1.0 - len(wanted) / len(said))
    return Share(math.exp(brevity + sum(logs) / len(logs)), 1.0)


def words(text: str) -> list[str]:
    """Normalised words: Chinese as jieba cuts it, the rest at spaces; no punctuation."""
    jieba = _jieba()
    return [word for word in jieba.cut(normal_text(text)) if not word.isspace()]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


class _Words:
    """The tokenizer object that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _scorer(*kinds: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), tokenizer=_Words())


@functools.cache
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports the deprecated pkg_resources
        import jieba
    jieba.setLogLevel(logging.WARNING)  # it announces its dictionary on stderr
    return jieba
