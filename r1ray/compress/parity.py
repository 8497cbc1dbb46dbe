"""Does a compressed model still say what the original says? Perplexity, logits and greedy answers against transformers in float32.

Takes the original's directory and a backend of the engine; knows neither the format of the compressed model nor the registry.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1ray.compress.config import ParityConfig
from r1ray.engine.backend import BLOCK_SIZE, Backend, Piece
from r1ray.engine.batching import BatchingEngine
from r1ray.engine.config import EngineConfig
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import CompressionError
from r1ray.types import Sampling

__all__ = ["LONGEST", "Parity", "check_parity", "compare"]

PIECE = 256  # tokens of one context
PROMPT = 32  # tokens of a prompt that is answered
LONGEST = 1024  # positions that a backend must hold for a comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """`logit_error` is the largest difference of a logit as a share of the largest logit; `first_choices` the share of positions with
    the same likeliest token; `greedy_equal` the share of equal greedy answers, ties within rounding counted as equal."""

    num_tokens: int
    perplexity: float
    reference_perplexity: float
    logit_error: float
    first_choices: float
    greedy_equal: float

    @property
    def perplexity_loss(self) -> float:
        return self.perplexity / self.reference_perplexity - 1

    @property
    def metrics(self) -> dict[str, float]:
        """Under the names that a manifest keeps."""
        return {f"parity_{name}": float(value) for name, value in {**asdict(self), "perplexity_loss": self.perplexity_loss}.items()}

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} against {self.reference_perplexity:.3f} ({self.perplexity_loss:+.2%}) on {self.num_tokens} "
            f"tokens, {self.first_choices:.1%} of first choices and {self.greedy_equal:.0%} of greedy answers equal, "
            f"logit error {self.logit_error:.2g}"
        )


def compare(source: Path, backend: Backend, token_ids: Sequence[int], config: ParityConfig) -> Parity:
    """`backend` is closed afterwards; it must hold LONGEST positions and `config.num_prompts` streams.

    Raises:
        CompressionError: less text than the comparison needs.
    """
    if len(token_ids) < config.num_tokens:
        raise CompressionError(
            f"The text has {len(token_ids)} tokens; parity.num_tokens is {config.num_tokens}. Give a longer parity.text."
        )
    model = _reference(source)
    error, largest, same, losses = 0.0, 0.0, 0, ([], [])  # type: ignore[var-annotated]
    for first in range(0, config.num_tokens - 1, PIECE):
        ids = list(token_ids[first : min(first + PIECE, config.num_tokens)])
        right, found = _right_logits(model, ids), _logits(backend, ids)
        error, largest = max(error, float((found - right).abs().max())), max(largest, float(right.abs().max()))
        same += int((found[:-1].argmax(-1) == right[:-1].argmax(-1)).sum())
        for loss, logits in zip(losses, (found, right), strict=True):
            loss.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
    mine, theirs = (torch.cat(loss).double() for loss in losses)
    return Parity(
        num_tokens=config.num_tokens,
        perplexity=math.exp(float(mine.mean())),
        reference_perplexity=math.exp(float(theirs.mean())),
        logit_error=error / largest,
        first_choices=same / len(mine),
        greedy_equal=_greedy_equal(model, backend, token_ids, config),
    )


def check_parity(found: Parity, config: ParityConfig, *, exact: bool) -> None:
    """`exact`: nothing was rounded on purpose, so the logits and the greedy answers must be the same too.

    Raises:
        CompressionError: which figure is beyond which bound.
    """
    wrong = []
    if not found.perplexity_loss <= config.max_perplexity_loss:  # not >: a NaN is refused too
        wrong.append(f"perplexity grew by {found.perplexity_loss:.2%} (parity.max_perplexity_loss is {config.max_perplexity_loss:.2%})")
    if not found.first_choices >= config.min_first_choices:
        wrong.append(
            f"{found.first_choices:.1%} of first choices are the same (parity.min_first_choices is {config.min_first_choices:.1%})"
        )
    if exact and not found.logit_error <= config.max_logit_error:
        wrong.append(f"a logit differs by {found.logit_error:.2g} (parity.max_logit_error is {config.max_logit_error:.2g})")
    if exact and found.greedy_equal < 1:
        wrong.append(f"only {found.greedy_equal:.0%} of the greedy answers are the same")
    if wrong:
        advice = "This is a defect of the export." if exact else "Take a higher precision; small models bear less."
        raise CompressionError(f"The compressed model was refused: {'; '.join(wrong)}. {advice} All figures: {found}.")


def _reference(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@torch.inference_mode()
def _right_logits(model: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def _logits(backend: Backend, ids: Sequence[int]) -> Tensor:
    return backend.forward([Piece(ids=ids, start=0, table=range(-(-len(ids) // BLOCK_SIZE)), num_logits=len(ids))])


def _greedy_equal(model: Any, backend: Backend, token_ids: Sequence[int], config: ParityConfig) -> float:
    """All prompts through the engine at once, as it will serve them."""
    step = max(1, (len(token_ids) - PROMPT) // config.num_prompts)
    prompts = [tuple(token_ids[number * step : number * step + PROMPT]) for number in range(config.num_prompts)]
    sampling = Sampling(temperature=0, max_tokens=config.num_new)
    requests = [GenerationRequest(id=str(i), prompt_ids=ids, sampling=sampling, ignore_eos=True) for i, ids in enumerate(prompts)]
    settings = EngineConfig(num_slots=config.num_prompts, max_context=LONGEST)
    engine = BatchingEngine(backend, settings, context_length=LONGEST)
    try:
        answers = generate_all(engine, requests)
    finally:
        asyncio.run(engine.stop())
    return sum(_is_greedy(model, ids, done.token_ids, config) for ids, done in zip(prompts, answers, strict=True)) / len(prompts)


def _is_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int], config: ParityConfig) -> bool:
    """Whether each token is the reference's first choice after those before it, or within rounding of it."""
    logits = _right_logits(model, [*prompt, *answer[:-1]])[-len(answer) :]
    behind = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return bool((behind <= config.max_logit_error * logits.abs().max()).all())
