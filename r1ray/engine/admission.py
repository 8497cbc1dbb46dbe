"""What every engine checks before it takes a request: one set of rules and error texts for all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import InvalidRequest, PromptTooLong

__all__ = ["check_beams", "check_prompt", "clipped_max_tokens", "drawable"]

log = logging.getLogger(__name__)


MOST_BEAMS = 64


def check_prompt(request: GenerationRequest, *, context_length: int, vocab_size: int | None = None, beams: bool = False) -> None:
    """Raises InvalidRequest (empty, or an id outside the vocabulary, in bias and stop ids too) or PromptTooLong (no room for one token).

    `beams`: whether the engine searches them.
    """
    num_prompt = len(request.prompt_ids)
    if request.num_beams > 1 and not beams:
        raise InvalidRequest(f"Request {request.id} wants {request.num_beams} beams; this engine searches none. Set num_beams=1.")
    if num_prompt == 0:
        raise InvalidRequest(f"Request {request.id} has an empty prompt. Send at least one token.")
    if num_prompt >= context_length:
        raise PromptTooLong(
            f"The prompt of {num_prompt} tokens leaves no room in the context of {context_length} tokens. "
            f"Shorten it to at most {context_length - 1} tokens."
        )
    if vocab_size is not None:
        biased = [token for token, _ in request.logit_bias]
        for what, ids in (("holds", request.prompt_ids), ("has a logit_bias for", biased), ("stops at", request.stop_token_ids)):
            _check_ids(request.id, what, ids, vocab_size)
        for num in (request.num_logprobs or 0, request.num_prompt_logprobs):
            if not 0 <= num <= vocab_size:
                raise InvalidRequest(f"Request {request.id} asks for {num} logprobs; give 0 to {vocab_size}.")


def check_beams(request: GenerationRequest) -> None:
    """Raises InvalidRequest for what a beam search has no meaning for or no room."""
    sampling = request.sampling
    penalised = sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
    if not 1 <= request.num_beams <= MOST_BEAMS:
        raise InvalidRequest(f"Request {request.id} wants {request.num_beams} beams; give 1 to {MOST_BEAMS}.")
    if request.num_beams > 1 and (sampling.temperature or penalised or request.prompt_logprobs):
        raise InvalidRequest(
            f"Request {request.id} wants {request.num_beams} beams, which search for the likeliest answer: "
            "set temperature=0, no penalties and no prompt_logprobs."
        )


def _check_ids(request_id: str, what: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"Request {request_id} {what} token id {wrong}; the vocabulary has 0 to {vocab_size - 1}. Use its tokenizer.")


def drawable(eos_token_ids: Iterable[int], vocab_size: int) -> frozenset[int]:
    """Those end-of-text ids that the model can draw; a tokenizer or a configuration may name others."""
    given = frozenset(eos_token_ids)
    known = frozenset(token for token in given if 0 <= token < vocab_size)
    if beyond := sorted(given - known):
        log.warning("end-of-text ids %s are beyond the vocabulary of %d and are ignored; correct the tokenizer", beyond, vocab_size)
    return known


def clipped_max_tokens(request: GenerationRequest, *, context_length: int) -> int:
    """Tokens that this request may draw: what it wants or what the context leaves, whichever is less."""
    room = context_length - len(request.prompt_ids)
    wanted = request.sampling.max_tokens
    if wanted > room:
        num_prompt = len(request.prompt_ids)
        log.info("request %s: max_tokens %d clipped to %d (prompt %d, context %d)", request.id, wanted, room, num_prompt, context_length)
    return min(wanted, room)
