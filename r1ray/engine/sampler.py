"""From logits to one token per stream. Rows are independent: what shares the batch changes nothing.

Order: bias, grammar mask, penalties, minimum length, temperature, top_k, top_p, min_p, draw. Every stream draws with its own random
numbers, so a seed gives the same tokens in any company (as far as the logits are the same: see docs on bfloat16).

Shapes: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from r1ray.engine.protocol import TokenLogprobs
from r1ray.engine.scheduler import Stream
from r1ray.types import Sampling

__all__ = ["Drawn", "NoToken", "Penalties", "new_rng", "prompt_logprobs", "sample"]

log = logging.getLogger(__name__)

SCORED_ROWS = 128
NUM_CANDIDATES = 256  # sorting these is cheap; a row whose nucleus is larger is sorted whole
Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A stream's next token, with its log-probabilities when they were asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


class NoToken(Enum):
    """Why a stream gets none. Damaged: the model gave no finite logits; forbidden: its mask or its bias leaves nothing of good ones."""

    DAMAGED = "damaged"
    FORBIDDEN = "forbidden"


class Penalties:
    """Token counts of one stream, kept only when a penalty is set."""

    def __init__(self, stream: Stream, vocab_size: int, device: torch.device) -> None:
        self.counts_V = torch.zeros(vocab_size, device=device)
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen_V[list(stream.request.prompt_ids)] = True
        for token in stream.generated:
            self.add(token)

    def add(self, token: int) -> None:
        self.counts_V[token] += 1
        self.seen_V[token] = True

    def apply(self, logits_V: Tensor, sampling: Sampling) -> None:
        """In place. Repetition (CTRL, arXiv 1909.05858) over prompt and answer; frequency and presence (OpenAI) over the answer."""
        if sampling.repetition_penalty != 1:
            seen = logits_V[self.seen_V]
            logits_V[self.seen_V] = torch.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
        logits_V -= sampling.frequency_penalty * self.counts_V + sampling.presence_penalty * (self.counts_V > 0)


def new_rng(sampling: Sampling) -> random.Random:
    return random.Random(sampling.seed)


def sample(logits_RV: Tensor, streams: Sequence[Stream]) -> list[Drawn | NoToken]:
    """One token per row, or why there is none. May overwrite the logits."""
    logits_RV = logits_RV if all(_is_plain_greedy(s) for s in streams) else logits_RV.float()
    before = {row: logits_RV[row].amax() for row, stream in enumerate(streams) if stream.request.mask or stream.request.logit_bias}
    for row, stream in enumerate(streams):
        if not _is_plain_greedy(stream):
            _constrain(logits_RV[row], stream)
    best_R, token_R = logits_RV.max(dim=-1)
    finite = torch.isfinite(best_R).tolist()
    tokens: list[int | None] = [t if ok else None for t, ok in zip(token_R.tolist(), finite, strict=True)]
    random_rows = [i for i, s in enumerate(streams) if s.request.sampling.temperature > 0 and finite[i]]
    if random_rows:
        for row, token in zip(random_rows, _draw(logits_RV[random_rows], [streams[i] for i in random_rows]), strict=True):
            tokens[row] = token
    drawn: list[Drawn | NoToken] = []
    for row, (chosen, stream) in enumerate(zip(tokens, streams, strict=True)):
        if chosen is not None:
            drawn.append(_booked(logits_RV, row, chosen, stream))
        else:
            drawn.append(NoToken.FORBIDDEN if row in before and bool(before[row].isfinite()) else NoToken.DAMAGED)
    return drawn


def _booked(logits_RV: Tensor, row: int, token: int, stream: Stream) -> Drawn:
    if stream.penalties is not None:
        stream.penalties.add(token)
    num = stream.request.num_logprobs
    return Drawn(token, None if num is None else _logprobs(logits_RV[row], token, num))


def _logprobs(logits_V: Tensor, token: int, num: int) -> TokenLogprobs:
    logprob_V = logits_V.double().log_softmax(-1)
    values, ids = logprob_V.topk(num)
    return TokenLogprobs(token=token, logprob=float(logprob_V[token]), top=tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def prompt_logprobs(logits_NV: Tensor, next_ids: Sequence[int], num_top: int = 0) -> tuple[list[float], list[Top]]:
    """Of the token that follows each row, and of the `num_top` likeliest in its place (no list for none).

    A few rows at a time, since a vocabulary of floats per row is large.
    """
    found: list[float] = []
    likeliest: list[Top] = []
    for first in range(0, len(next_ids), SCORED_ROWS):
        rows_RV = logits_NV[first : first + SCORED_ROWS].float()
        target_R1 = torch.tensor(next_ids[first : first + SCORED_ROWS], device=rows_RV.device)[:, None]
        total_R1 = rows_RV.logsumexp(-1, keepdim=True)
        found += (rows_RV.gather(1, target_R1) - total_R1)[:, 0].tolist()
        if num_top:
            values_RT, ids_RT = rows_RV.topk(num_top)
            pairs = zip(ids_RT.tolist(), (values_RT - total_R1).tolist(), strict=True)
            likeliest += [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return found, likeliest


def _is_plain_greedy(stream: Stream) -> bool:
    request = stream.request
    special = request.min_tokens or request.logit_bias or request.mask or _has_penalty(request.sampling)
    return request.sampling.temperature == 0 and not special


def _has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty)


def _constrain(logits_V: Tensor, stream: Stream) -> None:
    """Bias, grammar, minimum length and penalties, in place."""
    request = stream.request
    if request.logit_bias:
        ids, bias = zip(*request.logit_bias, strict=True)
        logits_V[list(ids)] += torch.tensor(bias, device=logits_V.device)
    if request.mask is not None and (allowed := _allowed(stream, logits_V.shape[0])) is not None:
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    if _has_penalty(request.sampling):
        if stream.penalties is None:
            stream.penalties = Penalties(stream, logits_V.shape[0], logits_V.device)
        stream.penalties.apply(logits_V, request.sampling)
    if len(stream.generated) < request.min_tokens and stream.stop_ids:
        logits_V[list(stream.stop_ids)] = -torch.inf


def _allowed(stream: Stream, vocab_size: int) -> list[int] | None:
    """What the grammar lets come next; nothing, which fails this request alone, when the grammar itself fails."""
    assert stream.request.mask is not None
    try:
        allowed = stream.request.mask(stream.generated)
        return None if allowed is None else [token for token in allowed if 0 <= token < vocab_size]
    except Exception:  # a caller's code in the engine's thread: the other streams go on
        log.exception("the mask of request %s failed", stream.request.id)
        return []


def _draw(logits_RV: Tensor, streams: Sequence[Stream]) -> list[int]:
    """One random number per row, then the inverse of the cumulated probabilities."""
    samplings = [s.request.sampling for s in streams]
    uniform_R1 = torch.tensor([s.rng.random() for s in streams], dtype=torch.float64, device=logits_RV.device)[:, None]
    temperature_R1 = torch.tensor([s.temperature for s in samplings], device=logits_RV.device)[:, None]
    # the maximum goes first: a very small temperature would overflow otherwise
    scaled_RV = (logits_RV - logits_RV.max(dim=-1, keepdim=True).values) / temperature_R1
    tokens = [0] * len(streams)
    filtered = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1 or s.min_p]
    plain = [i for i in range(len(streams)) if i not in set(filtered)]
    if plain:
        for row, token in zip(plain, _invert(scaled_RV[plain].softmax(-1), uniform_R1[plain]).tolist(), strict=True):
            tokens[row] = token
    if filtered:
        drawn = _draw_filtered(scaled_RV[filtered], uniform_R1[filtered], [samplings[i] for i in filtered])
        for row, token in zip(filtered, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw_filtered(scaled_RV: Tensor, uniform_R1: Tensor, samplings: Sequence[Sampling]) -> list[int]:
    num = min(NUM_CANDIDATES, scaled_RV.shape[1])
    tokens, enough = _from_candidates(scaled_RV, num, uniform_R1, samplings)
    short = [i for i, ok in enumerate(enough) if not ok]
    if short:
        again, _ = _from_candidates(scaled_RV[short], scaled_RV.shape[1], uniform_R1[short], [samplings[i] for i in short])
        for row, token in zip(short, again, strict=True):
            tokens[row] = token
    return tokens


def _from_candidates(
    scaled_RV: Tensor, num_candidates: int, uniform_R1: Tensor, samplings: Sequence[Sampling]
) -> tuple[list[int], list[bool]]:
    """Draw among the `num_candidates` likeliest, and say for each row whether they hold its whole nucleus."""
    device = scaled_RV.device
    top_k_R1 = torch.tensor([s.top_k or scaled_RV.shape[1] for s in samplings], device=device)[:, None]
    top_p_R1 = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    min_p_R1 = torch.tensor([s.min_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    scores_RC, ids_RC = scaled_RV.topk(num_candidates, dim=-1)
    prob_RC = (scores_RC.double() - scaled_RV.double().logsumexp(-1, keepdim=True)).exp()
    rank_C = torch.arange(num_candidates, device=device)
    in_top_k_RC = rank_C < top_k_R1
    # top_p is a share of what top_k leaves; beyond the candidates only if top_k does not end among them
    mass_R1 = torch.where(top_k_R1 <= num_candidates, (prob_RC * in_top_k_RC).sum(-1, keepdim=True), 1.0)
    before_RC = (prob_RC.cumsum(-1) - prob_RC) / mass_R1
    kept_RC = in_top_k_RC & (before_RC < top_p_R1) & (prob_RC >= min_p_R1 * prob_RC[:, :1])
    kept_RC[:, 0] = True
    top_k_ends_R = (top_k_R1[:, 0] <= num_candidates) | (top_k_R1[:, 0] >= scaled_RV.shape[1])
    enough_R = (top_k_ends_R & ~kept_RC[:, -1]) | (num_candidates == scaled_RV.shape[1]) | (top_k_R1[:, 0] == num_candidates)
    chosen_R1 = _invert(prob_RC * kept_RC, uniform_R1)[:, None]
    return ids_RC.gather(1, chosen_R1)[:, 0].tolist(), enough_R.tolist()


def _invert(weight_RC: Tensor, uniform_R1: Tensor) -> Tensor:
    """Index of the first cumulated weight above uniform * total, so never one of weight zero."""
    cumulated_RC = weight_RC.double().cumsum(-1)
    target_R1 = uniform_R1 * cumulated_RC[:, -1:]
    chosen_R = torch.searchsorted(cumulated_RC, target_R1, right=True)[:, 0]
    return chosen_R.clamp(max=weight_RC.shape[1] - 1)
