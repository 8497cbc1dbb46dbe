"""Bodies that no well-meaning client sends, and some that well-meaning ones do: understood, or refused by name."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest

from r1ray.serve.protocol import Refused
from r1ray.serve.request import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse

HELLO = [{"role": "user", "content": "你好"}]


def refusal(schema, body) -> tuple[int, str, str | None]:
    """(status, code, param) of what parsing and checking `body` ends with."""
    with pytest.raises(Refused) as caught:
        understood = parse(schema, body if isinstance(body, bytes) else json.dumps({"model": "fake", **body}).encode())
        understood.check_supported()
        assert understood.bias == ()
        understood.overrides()
        understood.to_messages()
    return caught.value.fault.status, caught.value.fault.code, caught.value.fault.param


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"n": 0}, "invalid_value", "n"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"min_p": float("inf")}, "invalid_value", "min_p"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"priority": -(2**31) - 1}, "invalid_value", "priority"),
        ({"logit_bias": {"5": float("nan")}}, "invalid_value", "logit_bias"),
        ({"repetition_penalty": 1e-320}, "invalid_value", "repetition_penalty"),
        ({"stop": 5}, "invalid_type", "stop"),
        ({"stop": ["a", None]}, "invalid_type", "stop.1"),
        ({"stop": ["x" * 9] * 17}, "invalid_value", "stop"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": [None]}, "invalid_type", "messages.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "no type"}]}]}, "missing_required_parameter", "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a cat"}]}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "unsupported_parameter", "messages"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"stream_options": [1]}, "invalid_type", "stream_options"),
        ({"metadata": "x"}, "invalid_type", "metadata"),
        ({"model": None}, "invalid_type", "model"),
    ],
)
def test_a_wrong_field_is_refused_by_its_own_name(changes, code: str, param: str) -> None:
    assert refusal(ChatBody, {"messages": HELLO} | changes) == (400, code, param)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(5, "prompt"), (None, "prompt"), ({}, "prompt"), ([1, "a"], "prompt.0"), ([[1], ["a"]], "prompt.1.0"), (["a", 1], "prompt.1")],
)
def test_a_wrong_prompt_is_refused_at_its_place(prompt, param: str) -> None:
    assert refusal(CompletionBody, {"prompt": prompt}) == (400, "invalid_type", param)


@pytest.mark.parametrize("prompt", [[-1], [[5], [10**30]]])
def test_an_id_that_no_tokenizer_has_is_refused_at_its_place(prompt) -> None:
    assert refusal(CompletionBody, {"prompt": prompt})[:2] == (400, "invalid_value")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"model": "a", }'])
def test_what_is_no_json_is_said_to_be_none(raw: bytes) -> None:
    assert refusal(ChatBody, raw) == (400, "invalid_json", None)


def test_a_refusal_does_not_send_a_large_body_back() -> None:
    with pytest.raises(Refused) as caught:
        parse(ChatBody, json.dumps({"model": "m", "messages": HELLO, "stop": ["x" * 10_000] * 17}).encode()).overrides()
    assert len(caught.value.fault.message) < 500


def test_every_optional_field_may_be_null() -> None:
    for schema, needed in ((ChatBody, {"messages": HELLO}), (CompletionBody, {"prompt": "x"})):
        nulls = dict.fromkeys(set(schema.model_fields) - {"model", *needed})
        body = parse(schema, json.dumps({"model": "fake", **nulls, **needed}).encode())
        body.check_supported()
        assert (body.overrides(), body.num_logprobs, body.bias, body.task_name) == ({}, None, (), None)


def test_numbers_without_a_meaning_beyond_their_range_are_cut_to_it() -> None:
    body = parse(ChatBody, json.dumps({"model": "m", "messages": HELLO, "top_k": 10**30, "max_tokens": 10**30}).encode())
    assert body.overrides() == {"top_k": 2**31 - 1, "max_tokens": 10**30}  # engines cut max_tokens to their context


def test_ids_and_messages_of_the_tokenizer_routes_are_checked() -> None:
    for tokens in ([-1], [2**40], ["a"]):
        with pytest.raises(Refused) as caught:
            parse(DetokenizeBody, json.dumps({"tokens": tokens}).encode())
        assert (caught.value.fault.status, caught.value.fault.param) == (400, "tokens.0")
    with pytest.raises(Refused):
        parse(TokenizeBody, b'{"messages": []}')


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "fake", **body}, timeout=20)


@pytest.mark.parametrize("n", [9, 10**12])
def test_more_choices_than_allowed_are_refused_before_any_is_made(serve_fake, n: int) -> None:
    server = serve_fake()
    for path, body in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": ["a"]})):
        refused = post(server, path, n=n, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert post(server, "/v1/completions", prompt=["a"] * 9).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": ["a", ""]}),
        ("/tokenize", {}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [-5]}),
    ],
)
def test_nothing_to_complete_is_a_400(serve_fake, path: str, body) -> None:
    response = post(serve_fake(), path, **body)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_odd_texts_are_answered(serve_fake) -> None:
    server = serve_fake()  # the engine echoes
    for text in ("", "\u0000", "\u202e\ufeff", "\u2028", "👩‍👩‍👧", "<think>", "</think>", "data: [DONE]\n\n", "a" * 500):
        content = [{"role": "user", "content": text}]
        assert post(server, "/v1/chat/completions", messages=content).json()["choices"][0]["message"]["content"] is not None
        lines = post(server, "/v1/chat/completions", messages=content, stream=True).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and all(json.loads(line[6:]) for line in lines[:-2])


def test_empty_stop_texts_stop_nothing(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("abc"))
    for stop in ("", [""], ["", "c"]):
        text = post(server, "/v1/chat/completions", messages=HELLO, stop=stop).json()["choices"][0]["message"]["content"]
        assert text == ("ab" if "c" in stop else "abc")


def test_the_largest_seed_has_choices_of_its_own(serve_fake, fakes) -> None:
    seeds = []
    server = serve_fake(answer=lambda request: (seeds.append(request.sampling.seed), [97])[1])
    assert post(server, "/v1/chat/completions", messages=HELLO, seed=2**63 - 1, n=2).status_code == 200
    assert sorted(seeds) == [-(2**63), 2**63 - 1]
