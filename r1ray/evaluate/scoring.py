"""Which metrics an example allows, decided by its gold answer alone, so that every model is scored on the same ones.

| gold answer                                   | metrics                                              |
| structured (JSON line, then a reply)          | intent_accuracy, entity_f1, format_ok, rouge_l (reply) |
| its intent's own words (text/label data)      | exact_match                                          |
| any other text                                | rouge_l (whole answer)                               |
| passages in the question, citations in gold   | citation_rate, besides                               |
"""

from __future__ import annotations

from r1ray.evaluate import exact
from r1ray.evaluate.answer import normal_text, parse_answer
from r1ray.evaluate.example import Example
from r1ray.evaluate.lexical import rouge_l
from r1ray.evaluate.shares import Share
from r1ray.model.prompts import CITATION

__all__ = ["score"]


def score(example: Example, answer: str) -> dict[str, Share]:
    """Metric name -> this example's share of it."""
    gold, found = parse_answer(example.gold.content), parse_answer(answer)
    scores: dict[str, Share] = {}
    if gold.is_structured:
        scores["intent_accuracy"] = exact.intent(found, gold)
        scores["entity_f1"] = exact.entities(found, gold)
        scores["format_ok"] = exact.well_formed(found)
    if _is_label(example):
        scores["exact_match"] = exact.exact_match(answer, example.gold.content)
    elif gold.reply:
        scores["rouge_l"] = rouge_l(found.reply, gold.reply)
    if example.num_passages and CITATION.search(gold.reply):
        scores["citation_rate"] = exact.citation(found.reply, example.num_passages)
    return scores


def _is_label(example: Example) -> bool:
    annotations = example.gold.annotations
    return (
        annotations is not None and annotations.intent is not None and normal_text(annotations.intent) == normal_text(example.gold.content)
    )
