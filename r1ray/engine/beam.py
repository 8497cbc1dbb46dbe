"""Beam search over the streams of the in-house engine: the answer with the highest probability per token that `num_beams` of them find.

Every beam is an ordinary greedy stream that also says what its likeliest next tokens are. A beam that goes on with the token that its
stream drew keeps it; one that goes on otherwise begins a new stream behind the same tokens, which shares the full blocks of the KV cache
by reference and computes the rest of the last block anew. The rules are those of transformers' `generate(num_beams=..., do_sample=False)`
with `early_stopping=False`. Knows no backend and no scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from r1ray.engine.admission import check_beams
from r1ray.engine.protocol import FinishReason, GenerationRequest, Mask, TokenChunk, TokenLogprobs
from r1ray.engine.scheduler import Stream
from r1ray.errors import GenerationFailed

__all__ = ["BEAM", "Candidate", "Ranking", "search_beams"]

BEAM = "#beam"  # between the id of a request and the number of one of its streams


class Submit(Protocol):
    def __call__(self, request: GenerationRequest, *, room: int) -> Stream:
        """A running stream. `room` is for how many more there must be room; 0 for one that takes the place of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An answer so far. `parent` is the beam that it continues; `score` the sum of its tokens' log-probabilities."""

    parent: int
    tokens: tuple[int, ...]
    score: float
    entries: tuple[TokenLogprobs, ...] = ()


class Ranking:
    """Which candidates go on and which are finished, step by step; no streams, so that it can be tested alone."""

    def __init__(self, *, num_beams: int, length_penalty: float, max_tokens: int, stop_ids: Collection[int], vocab_size: int) -> None:
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.max_tokens = max_tokens
        self.stop_ids = frozenset(stop_ids)
        self.num_candidates = min(vocab_size, max(2, 1 + len(self.stop_ids)) * num_beams)
        """So many that num_beams of them can go on even when each stop token follows each beam."""
        self._finished: list[tuple[float, Candidate]] = []

    def step(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that go on, best first; none when the search is over. All `candidates` have the same length."""
        best = sorted(candidates, key=lambda each: -each.score)[: self.num_candidates]
        going = []
        for rank, candidate in enumerate(best):
            if not self._ends(candidate):
                going.append(candidate)
            elif rank < self.num_beams:
                self._finished.append((self._value(candidate), candidate))
        self._finished = sorted(self._finished, key=lambda entry: -entry[0])[: self.num_beams]
        if not going or (len(self._finished) == self.num_beams and self._value(going[0]) <= self._finished[-1][0]):
            return []
        return going[: self.num_beams]

    def winner(self) -> Candidate | None:
        return self._finished[0][1] if self._finished else None

    def _ends(self, candidate: Candidate) -> bool:
        return candidate.tokens[-1] in self.stop_ids or len(candidate.tokens) == self.max_tokens

    def _value(self, candidate: Candidate) -> float:
        return candidate.score / float(len(candidate.tokens)) ** self.length_penalty


@dataclass(frozen=True, slots=True)
class _Beam:
    stream: Stream
    so_far: Candidate


async def search_beams(
    request: GenerationRequest, ranking: Ranking, submit: Submit, abandon: Callable[[Stream], None]
) -> AsyncGenerator[TokenChunk, None]:
    """The whole answer as one chunk. Closing the generator abandons the streams.

    Raises:
        InvalidRequest: settings that a beam search has no meaning for.
        GenerationFailed: no answer has a finite probability.
        As the streams do.
    """
    check_beams(request)
    numbers = itertools.count()

    def begin(so_far: Candidate, room: int) -> _Beam:
        return _Beam(submit(_part(request, ranking, so_far, next(numbers)), room=room), so_far)

    beams = [first := begin(Candidate(parent=0, tokens=(), score=0.0), ranking.num_beams)]
    try:
        while beams:
            drawn = []
            for beam in beams:
                chunk = await _next(beam.stream)
                if not chunk.logprobs:
                    yield replace(chunk, request_id=request.id, logprobs=())  # aborted
                    return
                drawn.append(chunk.logprobs[0])
            going = ranking.step([one for number, beam in enumerate(beams) for one in _continuations(number, beam.so_far, drawn[number])])
            kept = _kept(going, drawn)
            after = [
                _Beam(beams[one.parent].stream, one) if kept.get(one.parent) is one else begin(one, 0)  # behind its parent's blocks
                for one in going
            ]
            for number, beam in enumerate(beams):
                if number not in kept:
                    abandon(beam.stream)
            beams = after
        yield _answer(request, ranking, first.stream)
    finally:
        for beam in beams:
            abandon(beam.stream)


async def _next(stream: Stream) -> TokenChunk:
    item = await stream.mailbox.get()
    if isinstance(item, Exception):
        raise item
    return item


def _kept(going: Sequence[Candidate], drawn: Sequence[TokenLogprobs]) -> dict[int, Candidate]:
    """By beam, the candidate that goes on in that beam's own stream: the one with the token that the stream drew."""
    return {one.parent: one for one in going if one.tokens[-1] == drawn[one.parent].token}


def _continuations(parent: int, so_far: Candidate, drawn: TokenLogprobs) -> list[Candidate]:
    return [
        Candidate(
            parent=parent,
            tokens=(*so_far.tokens, token),
            score=so_far.score + logprob,
            entries=(*so_far.entries, TokenLogprobs(token=token, logprob=logprob, top=drawn.top)),
        )
        for token, logprob in drawn.top
        if logprob > float("-inf")
    ]


def _part(request: GenerationRequest, ranking: Ranking, so_far: Candidate, number: int) -> GenerationRequest:
    """The stream behind `so_far`. It starts before what waits: its search has been admitted already."""
    num = len(so_far.tokens)
    return replace(
        request,
        id=f"{request.id}{BEAM}{number}",
        prompt_ids=(*request.prompt_ids, *so_far.tokens),
        sampling=request.sampling.model_copy(update={"max_tokens": ranking.max_tokens - num}),
        priority=request.priority - (num > 0),
        num_beams=1,
        ignore_eos=True,
        keep_stop=False,
        min_tokens=max(0, request.min_tokens - num),
        num_logprobs=ranking.num_candidates,
        mask=_behind(request.mask, so_far.tokens),
    )


def _behind(mask: Mask | None, tokens: tuple[int, ...]) -> Mask | None:
    return None if mask is None else lambda drawn: mask([*tokens, *drawn])


def _answer(request: GenerationRequest, ranking: Ranking, first: Stream) -> TokenChunk:
    found = ranking.winner()
    if found is None:
        raise GenerationFailed(f"Request {request.id}: no beam has a finite probability. Mend its mask or its logit_bias.")
    reason: FinishReason = "stop" if found.tokens[-1] in ranking.stop_ids else "length"
    num = len(found.tokens) - (reason == "stop" and not request.keep_stop)
    wanted = request.num_logprobs
    entries = () if wanted is None else tuple(replace(entry, top=entry.top[:wanted]) for entry in found.entries[:num])
    return TokenChunk(
        request_id=request.id,
        token_ids=found.tokens[:num],
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_ids),
        num_cached_tokens=first.num_cached,
        logprobs=entries,
    )
