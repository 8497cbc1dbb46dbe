"""Token ids with their log-probabilities, as they arrive, to text with TokenScores: for requests that want logprobs, and only for those.

A score goes out with the Delta that its token's text begins in. What the text machines hold back (half a character, what may become a stop
text or a tag) holds its scores back; what they drop goes with the next text. At the end all have gone out, each once. Knows no HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from r1ray.engine.protocol import TokenChunk, TokenLogprobs
from r1ray.serve.codec import Codec
from r1ray.serve.protocol import Delta, Piece, TokenScore
from r1ray.serve.text import TextAssembler

__all__ = ["ScoredAssembler", "echoed"]


class ScoredAssembler(TextAssembler):
    """A TextAssembler whose Deltas carry scores. `offset`: how many characters of text come before the answer."""

    def __init__(self, codec: Codec, stops: Sequence[str], *, prefilled: bool | None, offset: int = 0) -> None:
        super().__init__(codec.decode, stops, prefilled=prefilled)
        self._codec = codec
        self._num_chars = offset
        self._waiting: deque[TokenScore] = deque()
        self._num_out = 0

    def feed_scored(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Delta:
        """As `feed`, with an entry of `logprobs` for each token."""
        reasoning, content, num_fed = "", "", 0
        for token, entry in zip(token_ids, logprobs, strict=True):
            self._waiting.append(_score(self._codec, token, entry.logprob, entry.top, self._num_chars))
            delta = self.feed((token,))
            reasoning, content, num_fed = reasoning + delta.reasoning, content + delta.content, num_fed + 1
            if self.stopped:
                break
        settled = self._num_chars - self.num_held
        ready: list[TokenScore] = []
        if reasoning or content or self.stopped:
            while self._waiting and (self.stopped or self._waiting[0].offset < settled):
                ready.append(self._waiting.popleft())
        return self._with(Delta(reasoning=reasoning, content=content, num_tokens=num_fed), ready)

    def flush(self) -> Delta:
        delta = super().flush()
        ready, self._waiting = list(self._waiting), deque()
        return self._with(delta, ready)

    def _with(self, delta: Delta, scores: Sequence[TokenScore]) -> Delta:
        num_reasoning = min(len(scores), max(0, self.num_reasoning_tokens - self._num_out))
        self._num_out += len(scores)
        return replace(delta, scores=tuple(scores), num_reasoning_scores=num_reasoning)

    def _split(self, text: str, num_tokens: int = 1) -> tuple[str, str]:
        self._num_chars += len(text)
        return super()._split(text, num_tokens)


def echoed(codec: Codec, text: str, prompt_ids: Sequence[int], first: TokenChunk, *, scored: bool) -> Delta:
    """A prompt as the beginning of its answer, whose `first` chunk has the log-probabilities of the prompt."""
    if not scored:
        return Delta(content=text, num_prompt_tokens=first.num_prompt_tokens)
    logprobs: list[float | None] = [None, *first.prompt_logprobs]
    top: list[Sequence[tuple[int, float]]] = [(), *(first.prompt_top or ((),) * len(first.prompt_logprobs))]
    pieces = [codec.piece(token) for token in prompt_ids]
    rows = zip(prompt_ids, logprobs, top, _offsets(text, pieces), strict=True)
    scores = tuple(_score(codec, token, logprob, likeliest, offset) for token, logprob, likeliest, offset in rows)
    return Delta(content=text, num_prompt_tokens=first.num_prompt_tokens, scores=scores)


def _score(codec: Codec, token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> TokenScore:
    likeliest = tuple((codec.piece(other), value) for other, value in top)
    return TokenScore(piece=codec.piece(token), logprob=logprob, top=likeliest, offset=offset)


def _offsets(text: str, pieces: Sequence[Piece]) -> list[int]:
    """Where in `text`, in characters, each piece begins; one that is not in it (a begin-of-text mark) takes no room."""
    data, at, num_begun = text.encode(), 0, 0
    found = []
    for piece in pieces:
        inside = at < len(data) and data[at] & 0xC0 == 0x80  # the character was begun by the piece before
        found.append(num_begun - inside)
        spelled = b"" if isinstance(piece, int) else piece
        if not at and not data.startswith(spelled):
            spelled = spelled.lstrip(b" ")  # SentencePiece puts a space before the first word
        if data.startswith(spelled, at):
            at += len(spelled)
            num_begun += sum(byte & 0xC0 != 0x80 for byte in spelled)
    return found
