"""From token ids, as they arrive, to text that may be shown: characters completed, reasoning split off, stop texts cut out.

Three small machines in a row, one set per choice. Nothing that is emitted is ever taken back: each machine holds back what
the next token could still change. Knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from r1ray.model.reasoning import ReasoningParser
from r1ray.serve.protocol import Delta

__all__ = ["Detokeniser", "StopScanner", "TextAssembler"]

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes half a character to."""

MAX_OPEN = 3
"""An unfinished character has at most three bytes; tokenizers show it as one U+FFFD or as one for each byte."""

MAX_WINDOW = 64
"""Tokens that are decoded again and again while bytes are broken; beyond, they are shown as they are."""

THINK_END = "</think>"


class Detokeniser:
    """Incremental decoding that is safe for characters of several tokens (a Chinese one is two or three in small vocabularies).

    Decodes a short window that begins one step before the new tokens and shows what was added: a tokenizer may treat the first
    token of a text differently, so tokens cannot be decoded one by one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_old = 0
        self._shown = ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text completed by these tokens; empty while a character is open."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        num_open = min(MAX_OPEN, len(text) - len(text.rstrip(REPLACEMENT)))
        if len(self._window) > MAX_WINDOW:
            num_open = 0
        elif not text.startswith(self._shown):
            return ""  # byte-fallback tokenizers show a whole run of byte tokens as broken while its last character is
        return self._show(text, len(text) - num_open, whole=not num_open)

    def flush(self) -> str:
        """What is left at the end, broken bytes included."""
        text = self._decode(self._window)
        return self._show(text, len(text), whole=True)

    def _show(self, text: str, end: int, *, whole: bool) -> str:
        shown, self._shown = text[len(self._shown) : end], text[: max(end, len(self._shown))]
        if whole and len(self._window) > self._num_old:
            del self._window[: self._num_old]
            self._num_old = len(self._window)
            self._shown = self._decode(self._window)
        return shown


class StopScanner:
    """Cuts the text at the stop text that is complete first and holds back what may be the beginning of one.

    Of several that end together the longest is cut. What is shown does not depend on where the chunks were cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    @property
    def num_held(self) -> int:
        """Characters that a stop text may still claim."""
        return len(self._held)

    def feed(self, text: str) -> str:
        """The part of the text that no stop text can claim any more; nothing after `stopped`."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        cut = len(self._held) - self._open_length()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """At the end of the stream an unfinished stop text is plain text."""
        shown, self._held = self._held, ""
        return shown

    def _open_length(self) -> int:
        """Length of the longest end of the held text that begins some stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextAssembler:
    """Token ids of one choice in, Deltas out; counts tokens exactly.

    `prefilled` says that the prompt ended inside <think>; None means that the text is raw and nothing is split (completions).
    Stop texts are looked for in the answer only: a blank line must not end the thinking.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], *, prefilled: bool | None) -> None:
        self._detokeniser = Detokeniser(decode)
        self._scanner = StopScanner(stops)
        self._parser = None if prefilled is None else ReasoningParser(prefilled=prefilled)
        self._thinking = _ThinkingCounter(prefilled)
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop text was found: whoever feeds this should abort the generation."""
        return self._scanner.stopped

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens up to and including the one that completed </think>; all of them while it is still open."""
        return self._thinking.num_tokens

    @property
    def num_held(self) -> int:
        """Characters that are complete and neither shown nor dropped yet."""
        return self._scanner.num_held + (self._parser.num_held if self._parser is not None else 0)

    def feed(self, token_ids: Sequence[int]) -> Delta:
        """Takes tokens one by one until a stop text, so that the count says how many were needed."""
        reasoning, content, num_fed = "", "", 0
        for token in token_ids:
            num_fed += 1
            more_reasoning, more_content = self._split(self._detokeniser.feed((token,)))
            reasoning, content = reasoning + more_reasoning, content + more_content
            if self.stopped:
                break
        self.num_tokens += num_fed
        return Delta(reasoning=reasoning, content=content, num_tokens=num_fed)

    def flush(self) -> Delta:
        """The held back rest; call it once, after the last token, unless `stopped`."""
        reasoning, content = self._split(self._detokeniser.flush(), num_tokens=0)
        if self._parser is not None:
            rest = self._parser.flush()
            reasoning += "".join(piece.text for piece in rest if piece.kind == "reasoning")
            content += self._scanner.feed("".join(piece.text for piece in rest if piece.kind == "content"))
        return Delta(reasoning=reasoning, content=content + self._scanner.flush())

    def _split(self, text: str, num_tokens: int = 1) -> tuple[str, str]:
        self._thinking.feed(text, num_tokens)
        if self._parser is None:
            return "", self._scanner.feed(text)
        pieces = self._parser.feed(text)
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        return reasoning, self._scanner.feed("".join(piece.text for piece in pieces if piece.kind == "content"))


class _ThinkingCounter:
    """How many tokens the reasoning took. The parser's pieces cannot tell: it holds text back across tokens."""

    def __init__(self, prefilled: bool | None) -> None:
        self._open: bool | None = False if prefilled is None else (prefilled or None)
        self._tail = ""
        self._num_seen = 0
        self.num_tokens = 0

    def feed(self, text: str, num_tokens: int) -> None:
        if self._open is False:
            return
        self._num_seen += num_tokens
        self._tail += text
        if self._open is None:
            self._decide()
        if self._open:
            self.num_tokens = self._num_seen
            if THINK_END in self._tail:
                self._open = False
            self._tail = self._tail[-len(THINK_END) + 1 :]

    def _decide(self) -> None:
        """Without a prefilled tag, only an answer that begins with <think> reasons."""
        start = self._tail.lstrip()
        if start.startswith("<think>"):
            self._open = True
        elif not "<think>".startswith(start):
            self._open = False
