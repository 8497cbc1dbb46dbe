"""Text to token ids and back for one loaded version: its tokenizer and its chat template behind five verbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from r1ray.errors import InvalidRequest
from r1ray.serve.protocol import Piece
from r1ray.serve.spelling import Spelling
from r1ray.types import Artifact, Message

__all__ = ["Codec", "TokenizerCodec"]


class Codec(Protocol):
    """What a host needs of a tokenizer."""

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a chat: template applied, generation prompt added.

        Raises:
            InvalidRequest: the template refuses such messages.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """A bare prompt, with the special tokens that the tokenizer adds."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; half a character decodes to U+FFFD."""
        ...

    def piece(self, token_id: int) -> Piece:
        """What one token spells, special tokens included."""
        ...

    def thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends inside an opened <think>, so that the answer begins with reasoning."""
        ...


class TokenizerCodec:
    """A transformers tokenizer with the artifact's infer template."""

    def __init__(self, artifact: Artifact, *, chat_template: Path | None = None) -> None:
        """
        Raises:
            TemplateMismatch: `chat_template` differs from the one the version was trained with.
        """
        from r1ray.model import load, template

        template.check_override(artifact, None if chat_template is None else chat_template.read_text(encoding="utf-8"))
        self._tokenizer: Any = load.load_tokenizer(artifact)
        self._spelling: Spelling | None = None

    def render(self, messages: Sequence[Message]) -> list[int]:
        from jinja2 import TemplateError

        from r1ray.model import template

        try:
            return template.prompt_ids(self._tokenizer, messages)
        except TemplateError as error:  # as those that want user and assistant to take turns
            raise InvalidRequest(f"The chat template of this model refuses the messages: {error}. Send them as it wants them.") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token_id: int) -> Piece:
        if self._spelling is None:
            self._spelling = Spelling(self._tokenizer)
        return self._spelling.piece(token_id)

    def thinking(self, prompt_ids: Sequence[int]) -> bool:
        tail = self._tokenizer.decode(prompt_ids[-8:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return bool(tail.rstrip().endswith("<think>"))
