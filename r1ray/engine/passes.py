"""From a planned step to the backend's pieces, and from what was computed and drawn to the chunks that readers get."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from r1ray.engine.backend import Piece
from r1ray.engine.protocol import FinishReason, TokenChunk
from r1ray.engine.sampler import Drawn, prompt_logprobs
from r1ray.engine.scheduler import Segment, Stream

__all__ = ["chunk_of", "piece_of", "scored", "waited"]


def piece_of(segment: Segment) -> Piece:
    stream = segment.stream
    return Piece(
        ids=stream.ids(segment.start, segment.num),
        start=segment.start,
        table=stream.blocks,
        num_logits=segment.num_logits,
        adapter=stream.request.adapter,
    )


def scored(logits: Tensor, plan: Sequence[Segment]) -> Tensor:
    """Book the logprobs of prompt tokens; what is left are the rows that a token is drawn from."""
    last_rows, first = [], 0
    for segment in plan:
        stream, rows = segment.stream, logits[first : first + segment.num_logits]
        first += segment.num_logits
        if segment.completes:
            last_rows.append(first - 1)
        if not stream.is_scored:
            following = stream.request.prompt_ids[segment.start + 1 : segment.start + 1 + segment.num]
            known = len(stream.prompt_logprobs) - segment.start  # more than nothing after a preemption
            of_prompt, likeliest = prompt_logprobs(rows[: len(following)], following, stream.request.num_prompt_logprobs)
            stream.prompt_logprobs += of_prompt[known:]
            stream.prompt_top += likeliest[known:]
    return logits[last_rows]


def chunk_of(stream: Stream, reason: FinishReason | None, drawn: Drawn | None = None) -> TokenChunk:
    request, is_first = stream.request, len(stream.generated) == 1
    return TokenChunk(
        request_id=request.id,
        token_ids=() if drawn is None else (drawn.token,),
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_ids),
        num_cached_tokens=stream.num_cached,
        logprobs=() if drawn is None or drawn.logprobs is None else (drawn.logprobs,),
        prompt_logprobs=tuple(stream.prompt_logprobs) if is_first else (),
        prompt_top=tuple(stream.prompt_top) if is_first else (),
    )


def waited(drawing: Sequence[Stream], running: Sequence[Stream], now: float) -> tuple[float, float] | None:
    """(mean seconds that these have waited since their last token, their share of the running streams that decode).

    Who draws its first token has waited for its prompt and begins to count now. None where nobody counts yet.
    """
    num_decoding = sum(stream.drawn_at > 0 for stream in running)
    waits = [now - stream.drawn_at for stream in drawing if stream.drawn_at]
    for stream in drawing:
        stream.drawn_at = now
    return (fmean(waits), len(waits) / num_decoding) if waits else None
