"""TokenScores as OpenAI's API shows them: `logprobs` of a chat's choice, and the older shape of a completion's.

A token that is part of a character has its bytes in full; its text shows them escaped (`\\xe4\\xbd`, in completions after `bytes:`), so
that no two tokens look the same. What can never come has the log-probability -9999, since JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1ray.serve.protocol import Piece, TokenScore

__all__ = ["chat_logprobs", "completion_logprobs"]

NEVER = -9999.0


def chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""
    content = [_entry(score.piece, score.logprob) | {"top_logprobs": [_entry(*each) for each in score.top]} for score in scores]
    return {"content": content, "refusal": None}


def completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions. The likeliest come with the token itself, so there may be one more than were asked for."""
    return {
        "tokens": [_name(score.piece) for score in scores],
        "token_logprobs": [None if score.logprob is None else max(score.logprob, NEVER) for score in scores],
        "top_logprobs": [_likeliest(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _entry(piece: Piece, logprob: float | None) -> dict[str, Any]:
    spelled = None if isinstance(piece, int) else list(piece)
    return {"token": _text(piece), "logprob": NEVER if logprob is None else max(logprob, NEVER), "bytes": spelled}


def _likeliest(score: TokenScore) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    found = {_name(score.piece): max(score.logprob, NEVER)}
    for piece, logprob in score.top:
        found.setdefault(_name(piece), max(logprob, NEVER))
    return found


def _name(piece: Piece) -> str:
    is_part = isinstance(piece, bytes) and not _is_text(piece)
    return f"bytes:{_text(piece)}" if is_part else _text(piece)


def _text(piece: Piece) -> str:
    return f"token_id:{piece}" if isinstance(piece, int) else piece.decode(errors="backslashreplace")


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
