"""Metrics of right or wrong: intent, entities, whole answer, format, citations. Each gives one example's Share.

A metric over a set is the quotient of summed shares, so accuracy, micro-F1 and rates are all of one kind (see `shares.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1ray.evaluate.answer import Answer, normal_text, normal_value
from r1ray.evaluate.shares import Share
from r1ray.model.prompts import CITATION

__all__ = ["citation", "entities", "exact_match", "intent", "well_formed"]


def intent(answer: Answer, gold: Answer) -> Share:
    """1 when the intent is the gold one; an answer without the structured form has none."""
    right = answer.intent is not None and gold.intent is not None and answer.intent.strip() == gold.intent.strip()
    return Share(float(right), 1.0)


def entities(answer: Answer, gold: Answer) -> Share:
    """Micro-F1 over name=value pairs: 2 TP / (2 TP + FP + FN). Neither has any: nothing to count."""
    found, wanted = _pairs(answer.entities), _pairs(gold.entities)
    right = len(found & wanted)
    return Share(2.0 * right, float(len(found) + len(wanted)))


def exact_match(answer: str, gold: str) -> Share:
    """1 when both have the same words in the same order; case, width, punctuation and underscores aside."""
    return Share(float(normal_text(answer) == normal_text(gold)), 1.0)


def well_formed(answer: Answer) -> Share:
    """1 when the answer begins with the structured line."""
    return Share(float(answer.is_structured), 1.0)


def citation(reply: str, num_passages: int) -> Share:
    """1 when the reply cites at least one passage that exists."""
    cited = {int(number) for number in CITATION.findall(reply) if len(number) < 9}
    return Share(float(any(1 <= number <= num_passages for number in cited)), 1.0)


def _pairs(entities_: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(normal_text(name), normal_value(value)) for name, value in entities_.items() if value is not None}
