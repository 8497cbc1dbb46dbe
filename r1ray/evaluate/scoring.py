"""Which metrics an example allows, decided by its gold answer alone, so that every model is scored on the same ones.

| gold answer                                   | metrics                                              |
| structured (JSON line, then a reply)          | intent_accuracy, entity_f1, format_ok; of the reply rouge_1, rouge_2, rouge_l, bleu |
| its intent's own words (text/label data)      | exact_match                                          |
| any other text                                | rouge_1, rouge_2, rouge_l, bleu of the whole answer  |
| passages in the question, citations in gold   | citation_rate, besides                               |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from r1ray.errors import EvaluationError
from r1ray.evaluate import exact
from r1ray.evaluate.answer import normal_text, parse_answer
from r1ray.evaluate.example import Example, examples_of
from r1ray.evaluate.lexical import lexical
from r1ray.evaluate.shares import Share
from r1ray.model.prompts import CITATION
from r1ray.types import Conversation

__all__ = ["allowed", "check_metrics", "score"]

_ANY = frozenset({"perplexity"})


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
        scores |= lexical(found.reply, gold.reply)
    if example.num_passages and CITATION.search(gold.reply):
        scores["citation_rate"] = exact.citation(found.reply, example.num_passages)
    return scores


def allowed(examples: Iterable[Example]) -> set[str]:
    """Metrics that at least one gold answer allows."""
    return {name for example in examples for name in score(example, "")} | _ANY


def check_metrics(wanted: Collection[str], conversations: Sequence[Conversation], *, where: str, of: str) -> list[str]:
    """Before a model is loaded: those of `wanted` that the set does not allow. `where` is the key that names them.

    Raises:
        EvaluationError: the set allows none of them, or cannot be scored.
    """
    found = allowed(examples_of(conversations))
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        known = ", ".join(sorted(found))
        raise EvaluationError(f"{where} names {', '.join(missing)}; the gold answers of {of} allow {known}. Name one of those.")
    return missing


def _is_label(example: Example) -> bool:
    annotations = example.gold.annotations
    return (
        annotations is not None and annotations.intent is not None and normal_text(annotations.intent) == normal_text(example.gold.content)
    )
