"""R1's `<think>` text apart from its answer, in a stream whose chunks may cut anything anywhere.

R1's chat template puts `<think>` into the *prompt*, so the output starts inside the reasoning and only the closing tag appears
in it: the parser's first state is seeded from the prompt. Works on text, so it needs no tokenizer with think tokens.
It knows neither tokens nor HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CLOSE", "OPEN", "Piece", "ReasoningParser", "split"]

OPEN = "<think>"
CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the one or the other kind; never empty."""

    kind: Literal["reasoning", "content"]
    text: str


class ReasoningParser:
    """Feed chunks, then flush once. The pieces do not depend on where the chunks were cut.

    The reasoning comes without its tags and without white space around it; white space between `</think>` and the answer is dropped.
    Without a closing tag everything is reasoning (the answer was cut off); without any tag and not prefilled everything is content.

    Args:
        prefilled: The prompt already ended with `<think>`; see `TemplatePair.thinks`.
    """

    def __init__(self, prefilled: bool) -> None:
        self._prefilled = prefilled
        self._state: Literal["start", "reasoning", "gap", "content"] = "start"
        self._started = False  # whether this reasoning has shown any text
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the next token belongs to the reasoning, as far as can be said."""
        return self._state == "reasoning" or (self._state == "start" and self._prefilled)

    @property
    def num_held(self) -> int:
        """Characters that were fed and are neither given nor dropped yet."""
        return len(self._held)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`; a possible beginning of a tag and trailing white space are held back."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._decide()
        if self._state == "reasoning":
            pieces += self._reason()
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "content"
        if self._state == "content":
            pieces += self._emit("content", len(self._held))
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the stream."""
        if self.thinking:
            self._held = self._held.rstrip() if self._started else self._held.strip()
            return self._emit("reasoning", len(self._held))
        return self._emit("content", len(self._held) if self._state != "gap" else 0)

    def _decide(self) -> None:
        """Leave `start` once it is clear whether the output opens with a tag (R1 sometimes repeats the prefilled one)."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held = text[len(OPEN) :]
            self._state = "reasoning"
        elif not OPEN.startswith(text):
            self._state = "reasoning" if self._prefilled else "content"

    def _reason(self) -> list[Piece]:
        if not self._started:
            self._held = self._held.lstrip()
        text, close, rest = self._held.partition(CLOSE)
        if close:
            self._held = text.rstrip()
            pieces = self._emit("reasoning", len(self._held))
            self._held, self._state = rest, "gap"
            return pieces
        certain = text[: len(text) - _tag_prefix(text)].rstrip()
        return self._emit("reasoning", len(certain))

    def _emit(self, kind: Literal["reasoning", "content"], length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        self._started = self._started or bool(text)
        return [Piece(kind, text)] if text else []


def split(text: str, prefilled: bool) -> tuple[str | None, str]:
    """(reasoning or None, content) of a complete output."""
    parser = ReasoningParser(prefilled)
    pieces = [*parser.feed(text), *parser.flush()]
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return reasoning or None, "".join(piece.text for piece in pieces if piece.kind == "content")


def _tag_prefix(text: str) -> int:
    """Length of the longest end of `text` that may begin a closing tag."""
    return next((size for size in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:size])), 0)
