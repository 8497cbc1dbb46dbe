"""The bytes that a token stands for, whatever way its tokenizer has of writing them down.

Byte-level tokenizers (Llama 3, Qwen, DeepSeek) have a character for each byte, SentencePiece (Llama 2, Mistral) a mark for spaces and
`<0xE4>` for single bytes. Decoding a token by itself would lose both halves of characters and spaces at the beginning.
"""

from __future__ import annotations

import re
from typing import Any

from r1ray.serve.protocol import Piece

__all__ = ["Spelling"]

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"


class Spelling:
    """Token id -> piece, special tokens included; each is looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: one of transformers'."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = backend.decoder.__getstate__() if backend is not None and backend.decoder is not None else b""
        self._tokenizer = tokenizer
        self._is_byte_level = b'"ByteLevel"' in decoder
        self._marks_spaces = SPACE.encode() in decoder or b'"Metaspace"' in decoder
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._known: dict[int, Piece] = {id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()}

    def piece(self, token_id: int) -> Piece:
        """Its bytes; the id itself for one beyond the vocabulary, as models with padded embeddings have them."""
        if (found := self._known.get(token_id)) is None:
            found = self._known[token_id] = self._spelled(token_id)
        return found

    def _spelled(self, token_id: int) -> Piece:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return token_id
        if self._is_byte_level and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if byte := BYTE.fullmatch(token):
            return bytes.fromhex(byte[1])
        if self._marks_spaces:
            return str(token).replace(SPACE, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()
