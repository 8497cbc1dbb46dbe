"""One model over one set of dialogues: text in, Report out.

    report = evaluate(artifact, conversations, config, registry=registry)

Generates every answer once, scores it with each metric that its gold answer allows, and measures the perplexity of the gold answers.
Where perplexity is all that is wanted, nothing is generated.
Knows no MLflow, no terminal and no Ray.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1ray.data.schema import data_hash
from r1ray.engine.create import create_engine
from r1ray.engine.offline import Completion, generate_all
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import EvaluationError, TemplateNotTrainable
from r1ray.evaluate.config import EvaluateConfig
from r1ray.evaluate.example import Example, examples_of
from r1ray.evaluate.perplexity import Scored, answer_start
from r1ray.evaluate.progress import Progress
from r1ray.evaluate.scoring import score
from r1ray.evaluate.shares import Share
from r1ray.evaluate.summary import summarise
from r1ray.model.load import load_tokenizer, training_tokenizer
from r1ray.model.reasoning import split
from r1ray.model.template import prompt_ids, read, training_ids
from r1ray.registry import Registry
from r1ray.types import Artifact, Conversation, Report, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

LENGTH_SLACK = 16  # tokens that length_margin adds, so that short gold answers leave room for a format


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is evaluated on what."""

    artifact: Artifact
    config: EvaluateConfig
    registry: Registry
    sampling: Sampling
    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase

    @functools.cached_property
    def teacher(self) -> PreTrainedTokenizerBase:
        """The tokenizer under the training template."""
        return training_tokenizer(self.artifact)

    @property
    def system_prompt(self) -> str | None:
        return self.config.data.system_prompt or self.artifact.manifest.system_prompt

    def wants(self, metric: str) -> bool:
        return self.config.metrics is None or metric in self.config.metrics

    @property
    def wants_answers(self) -> bool:
        return self.config.metrics is None or set(self.config.metrics) != {"perplexity"}


def evaluate(
    artifact: Artifact,
    conversations: Sequence[Conversation],
    config: EvaluateConfig,
    *,
    registry: Registry,
    sampling: Sampling | None = None,
    engine: Engine | None = None,
) -> Report:
    """Answer the last turn of every dialogue and compare.

    Args:
        sampling: In place of `config.sampling`.
        engine: A running engine of this artifact, left running; perplexity is then left out, since no sampling changes it.
            Without one the model is loaded, measured and freed.

    Raises:
        EvaluationError: no dialogue, dialogues without an assistant turn after a question, or nothing that the engine can measure.
        PromptTooLong: a question exceeds the model's context.
    """
    subject = _Subject(
        artifact=artifact,
        config=config,
        registry=registry,
        sampling=sampling or config.sampling,
        examples=examples_of(conversations),
        tokenizer=load_tokenizer(artifact),
    )
    nothing = [None] * len(subject.examples)
    surprise, answers = _with_own_engine(subject) if engine is None else (nothing, _answers(subject, engine))
    completions = answers.completions if answers else nothing
    rows = [_row(subject, *parts) for parts in zip(subject.examples, completions, surprise, strict=True)]
    metrics = summarise(rows, num_bootstrap=config.num_bootstrap, seed=config.seed) | (answers.speed() if answers else {})
    return Report(
        model=artifact.ref,
        dataset=str(config.data.path),
        data_hash=data_hash(conversations),
        num_examples=len(rows),
        metrics=metrics,
        examples=tuple(rows),
    )


def _with_own_engine(subject: _Subject) -> tuple[Sequence[Share | None], _Answers | None]:
    """One engine scores the gold answers and writes its own, where some are wanted."""
    engine = create_engine(subject.artifact, subject.config.engine, subject.registry)
    surprise: Sequence[Share | None] = [None] * len(subject.examples)
    try:
        if "prompt_logprobs" in engine.capabilities:
            surprise = _perplexity(subject, engine) if subject.wants("perplexity") else surprise
        elif not subject.wants_answers:
            raise EvaluationError(
                f"metrics=[perplexity], and engine.type={subject.config.engine.type} gives no probabilities of a given text for "
                f"{subject.artifact.ref}. Set engine.type=torch, or name other metrics."
            )
        return surprise, _answers(subject, engine) if subject.wants_answers else None
    finally:
        asyncio.run(engine.stop())


def _perplexity(subject: _Subject, engine: Engine) -> Sequence[Share | None]:
    """One share per example, None for those outside the sample."""
    num, limit = len(subject.examples), subject.config.perplexity_examples
    chosen = sorted(random.Random(subject.config.seed).sample(range(num), min(num, limit or num)))
    try:
        texts = {i: _scored(subject, subject.examples[i]) for i in chosen}
    except TemplateNotTrainable as error:
        log.warning("no perplexity for %s: %s", subject.artifact.ref, error)
        return [None] * num
    if long := [i for i, text in texts.items() if len(text.ids) >= engine.context_length]:
        log.warning("no perplexity of %d dialogues: with their gold answers they exceed %d tokens", len(long), engine.context_length)
        texts = {i: text for i, text in texts.items() if i not in long}
    with Progress(subject.config.progress_s, f"{subject.artifact.ref} perplexity", len(texts)) as progress:
        requests = [_scoring(f"{index}:gold", text) for index, text in texts.items()]
        done = generate_all(engine, requests, on_done=lambda _: progress.one(0))
    by_index = {index: _share(text, one.prompt_logprobs) for (index, text), one in zip(texts.items(), done, strict=True)}
    return [by_index.get(i) for i in range(num)]


def _scoring(name: str, text: Scored) -> GenerationRequest:
    """The prompt is the whole dialogue; the one token that is drawn after it is not wanted."""
    sampling = Sampling(temperature=0, max_tokens=1)
    return GenerationRequest(id=name, prompt_ids=tuple(text.ids), sampling=sampling, ignore_eos=True, prompt_logprobs=True)


def _share(text: Scored, logprobs: Sequence[float]) -> Share:
    """Nothing predicts the very first token."""
    of_answer = logprobs[max(text.start, 1) - 1 :]
    return Share(-math.fsum(of_answer), float(len(of_answer)))


def _scored(subject: _Subject, example: Example) -> Scored:
    ids, mask = training_ids(subject.teacher, [*example.prompt, example.gold], system_prompt=subject.system_prompt)
    start, end = answer_start(mask)
    return Scored(ids[:end], start)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Every answer, and the seconds that all of them took."""

    completions: Sequence[Completion]
    seconds: float

    def speed(self) -> dict[str, float]:
        num_tokens = sum(len(one.token_ids) for one in self.completions)
        return {
            "tokens_per_second": num_tokens / max(self.seconds, 1e-9),
            "generation_seconds": self.seconds,
            "mean_answer_tokens": num_tokens / len(self.completions),
            "truncated_share": sum(one.finish_reason == "length" for one in self.completions) / len(self.completions),
        }


def _answers(subject: _Subject, engine: Engine) -> _Answers:
    requests = [_request(subject, index, example) for index, example in enumerate(subject.examples)]
    begin = time.perf_counter()
    with Progress(subject.config.progress_s, f"{subject.artifact.ref} answers", len(requests)) as progress:
        completions = generate_all(engine, requests, on_done=lambda completion: progress.one(len(completion.token_ids)))
    return _Answers(completions=completions, seconds=time.perf_counter() - begin)


def _request(subject: _Subject, index: int, example: Example) -> GenerationRequest:
    sampling = subject.sampling
    ids = prompt_ids(subject.tokenizer, example.prompt, system_prompt=subject.system_prompt)
    limit = sampling.max_tokens
    if subject.config.length_margin is not None:
        gold = (example.gold.reasoning or "") + example.gold.content
        num_gold = len(subject.tokenizer.encode(gold, add_special_tokens=False))
        limit = min(limit, math.ceil(subject.config.length_margin * num_gold) + LENGTH_SLACK)
    seed = None if sampling.seed is None else sampling.seed + index
    return GenerationRequest(
        id=f"{index}:{example.id}",
        prompt_ids=tuple(ids),
        sampling=sampling.model_copy(update={"max_tokens": limit, "seed": seed}),
        cache_salt=subject.config.cache_salt,
    )


def _row(subject: _Subject, example: Example, completion: Completion | None, surprise: Share | None) -> Mapping[str, Any]:
    """One example of the report: readable texts, then `shares`, what it adds to each metric; no answer where none was wanted."""
    answered, scores = _answered(subject, example, completion) if completion is not None else ({}, {})
    if surprise is not None:
        scores = {**scores, "perplexity": surprise}
    return {
        "id": example.id,
        "source": example.source,
        "language": example.language,
        "intent": example.gold.annotations.intent if example.gold.annotations else None,
        "question": example.question,
        "gold": example.gold.content,
        **answered,
        "shares": {name: list(share) for name, share in scores.items() if subject.wants(name)},
    }


def _answered(subject: _Subject, example: Example, completion: Completion) -> tuple[dict[str, Any], dict[str, Share]]:
    text = subject.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    reasoning, answer = split(text, prefilled=read(subject.artifact).thinks)
    answer = _cut(answer, subject.sampling.stop)
    fields = {
        "answer": answer,
        "reasoning": reasoning,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "ttft_s": round(completion.ttft_s, 4),
        "seconds": round(completion.seconds, 4),
    }
    return fields, score(example, answer)


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
