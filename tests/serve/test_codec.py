"""A version's tokenizer and template behind the codec that hosts use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from r1ray.errors import InvalidRequest
from r1ray.model import template
from r1ray.serve.codec import TokenizerCodec
from r1ray.types import Artifact, Manifest, Message

STRICT = """{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must take turns') -}}{%- endif -%}
{{- message['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>' -}}{%- endif -%}"""


@pytest.fixture
def codec(tiny_tokenizer: Any, tmp_path: Path) -> TokenizerCodec:
    tiny_tokenizer(STRICT).save_pretrained(tmp_path)
    manifest = Manifest(
        name="strict",
        kind="full",
        family="llama",
        weights_sha256="0" * 64,
        template=template.write(template.TemplatePair(infer=STRICT, train=STRICT, thinks=False), tmp_path),
        context_length=512,
        num_parameters=0,
        created_at="2026-01-01T00:00:00+00:00",
    )
    return TokenizerCodec(Artifact(path=tmp_path, manifest=manifest, version=1))


def test_messages_that_the_template_refuses_are_the_clients_mistake(codec: TokenizerCodec) -> None:
    asked = Message(role="user", content="hi")
    assert codec.decode(codec.render([asked])) == "hi"
    with pytest.raises(InvalidRequest, match="roles must take turns"):
        codec.render([asked, asked])


def test_pieces_are_a_texts_bytes_with_what_decoding_leaves_out(codec: TokenizerCodec) -> None:
    ids = codec.encode("我的卡 <|im_end|>")
    assert b"".join(codec.piece(token) for token in ids) == "我的卡 <|im_end|>".encode()
    assert codec.decode(ids) == "我的卡 "
