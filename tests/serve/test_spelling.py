"""Tokens to bytes, for the two ways in which tokenizers write bytes down."""

from __future__ import annotations

from typing import Any

import pytest

from r1ray.serve.spelling import Spelling

TEXTS = ["我的信用卡丢了 my credit card, 谢谢！", "  two  spaces\n\tand é 😀", "<|im_start|>user\nhi<|im_end|><think>"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_byte_level_text_are_its_bytes(tiny_tokenizer, text: str) -> None:
    tokenizer = tiny_tokenizer(None)
    spelling = Spelling(tokenizer)
    assert b"".join(spelling.piece(token) for token in tokenizer.encode(text)) == text.encode()


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """As Llama 2's: a mark for spaces, `<0x..>` for what is not in the vocabulary, a begin-of-text mark."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "m", "y", "\u2581m", "\u2581my"]
    bpe = models.BPE(
        {word: id_ for id_, word in enumerate(words)}, [("\u2581", "m"), ("\u2581m", "y")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_the_pieces_of_a_sentencepiece_text_are_its_bytes_after_a_space(sentencepiece) -> None:
    spelling, ids = Spelling(sentencepiece), sentencepiece.encode("my 卡 my")
    assert sentencepiece.decode(ids) == "my 卡 my"
    assert b"".join(spelling.piece(token) for token in ids) == " my 卡 my".encode()
    assert spelling.piece(1) == b"<s>"


def test_an_id_that_the_tokenizer_does_not_know_is_its_own_piece(tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer(None)
    assert Spelling(tokenizer).piece(len(tokenizer) + 5) == len(tokenizer) + 5
