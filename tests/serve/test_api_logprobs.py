"""Log-probabilities and echo over HTTP: what OpenAI's client gets, whole and streamed, and what is refused."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest

HELLO = [{"role": "user", "content": "你好"}]
THOUGHT = "先想</think>\n\n答案 42"


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json={"model": "fake", **body}, timeout=20)


def spelled(entries) -> bytes:
    return b"".join(bytes(entry.bytes) for entry in entries)


def streamed(client, **options) -> dict[int, list]:
    """Index of a choice -> its chunks."""
    choices: dict[int, list] = {}
    for chunk in client.chat.completions.create(model="fake", messages=HELLO, stream=True, **options):
        for choice in chunk.choices:
            choices.setdefault(choice.index, []).append(choice)
    return choices


def test_a_strict_client_reads_an_entry_per_token(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("答案 42"), scores=True).openai()
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == len("答案 42".encode())
    assert spelled(content).decode() == "答案 42" and answer.choices[0].logprobs.refusal is None
    assert (content[0].token, content[-1].token) == ("\\xe7", "2")
    for entry in content:
        right = fakes.likelihood(entry.bytes[0], 3)
        assert entry.logprob == right.logprob
        assert [(each.bytes[0], each.logprob) for each in entry.top_logprobs] == list(right.top)


def test_top_logprobs_are_none_unless_asked_for_and_nothing_is_sent_without_logprobs(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("ab"), scores=True).openai()
    bare = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True)
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[], []]
    for options in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": None}, {"logprobs": False, "top_logprobs": 0}):
        assert client.chat.completions.create(model="fake", messages=HELLO, **options).choices[0].logprobs is None
        assert all(choice.logprobs is None for choice in streamed(client, **options)[0])


def test_each_chunk_of_a_stream_has_the_entries_of_its_own_text(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("答案 42!"), scores=True, token_delay_s=0.003).openai()
    chunks = streamed(client, logprobs=True, top_logprobs=1, n=2)
    assert set(chunks) == {0, 1}
    for choices in chunks.values():
        with_text = [choice for choice in choices if choice.delta.content]
        assert len(with_text) > 1
        assert all(spelled(choice.logprobs.content).decode() == choice.delta.content for choice in with_text)
        assert all(choice.logprobs is None for choice in choices if not choice.delta.content)
        assert b"".join(spelled(choice.logprobs.content) for choice in with_text).decode() == "答案 42!"


@pytest.mark.parametrize("delay", [0.0, 0.002])
def test_reasoning_is_scored_like_the_answer(serve_fake, fakes, delay: float) -> None:
    client = serve_fake(answer=fakes.says(THOUGHT), thinks=True, scores=True, token_delay_s=delay).openai()
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True)
    assert spelled(answer.choices[0].logprobs.content).decode() == THOUGHT
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    choices = [choice for choice in streamed(client, logprobs=True)[0] if choice.logprobs]
    assert b"".join(spelled(choice.logprobs.content) for choice in choices).decode() == THOUGHT
    thought = [choice for choice in choices if getattr(choice.delta, "reasoning", None)]
    assert all(spelled(choice.logprobs.content).decode().startswith(choice.delta.reasoning) for choice in thought)


def test_reasoning_that_is_not_shown_is_not_told_by_its_entries_either(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says(THOUGHT), thinks=True, scores=True).openai()
    hidden = {"logprobs": True, "extra_body": {"include_reasoning": False}}
    answer = client.chat.completions.create(model="fake", messages=HELLO, **hidden)
    assert spelled(answer.choices[0].logprobs.content).decode() == "\n\n答案 42"
    num_hidden = answer.usage.completion_tokens_details.reasoning_tokens
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens - num_hidden
    choices = [choice for choice in streamed(client, **hidden)[0] if choice.logprobs]
    assert b"".join(spelled(choice.logprobs.content) for choice in choices).decode() == "\n\n答案 42"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_texts_tokens_are_entries_since_they_are_counted(serve_fake, fakes, stream: bool) -> None:
    client = serve_fake(answer=fakes.says("one. STOP two"), scores=True).openai()
    options = {"logprobs": True, "stop": "STOP"}
    if stream:
        choices = streamed(client, **options)[0]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        answer = client.chat.completions.create(model="fake", messages=HELLO, **options)
        entries, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
        assert answer.usage.completion_tokens == len(entries)
    assert (text, spelled(entries)) == ("one. ", b"one. STOP")


def test_a_completions_lists_are_as_long_as_its_tokens(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("a你b"), scores=True).openai()
    answer = client.completions.create(model="fake", prompt=["x", "yz"], logprobs=2, n=2)
    assert answer.usage.completion_tokens == 4 * 5
    for choice in answer.choices:
        found = choice.logprobs
        assert found.tokens == ["a", "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "b"]
        assert found.text_offset == [0, 1, 1, 1, 2]
        assert found.token_logprobs == [-byte / 100 for byte in "a你b".encode()]
        assert found.top_logprobs[0] == {"a": -0.97, "b": -1.97}
    bare = client.completions.create(model="fake", prompt="x", logprobs=0).choices[0].logprobs
    assert bare.top_logprobs[-1] == {"b": -0.98}
    assert client.completions.create(model="fake", prompt="x").choices[0].logprobs is None


@pytest.mark.parametrize("prompt", ["你 x", [*"你 x".encode()]])
def test_echo_puts_the_scored_prompt_before_the_answer(serve_fake, fakes, prompt) -> None:
    client = serve_fake(answer=fakes.says("ab"), scores=True).openai(strict=False)  # the strict one knows no null for the first token
    answer = client.completions.create(model="fake", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    choice, found = answer.choices[0], answer.choices[0].logprobs
    assert (choice.text, choice.finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens) == ("你 xa", "length", 5, 1)
    assert found.tokens == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", " ", "x", "a"]
    assert found.text_offset == [0, 0, 0, 1, 2, 3]
    assert found.token_logprobs == [None, *(-byte / 100 for byte in "你 xa".encode()[1:])]
    assert found.top_logprobs[0] is None and found.top_logprobs[3:] == [{" ": -0.32}, {"x": -1.2}, {"a": -0.97}]


def test_an_echo_is_streamed_before_the_answer(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("abc"), scores=True, token_delay_s=0.003).openai(strict=False)
    chunks = list(client.completions.create(model="fake", prompt="xy", echo=True, logprobs=0, n=2, stream=True))
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert choices[0].text == "xy" and choices[0].logprobs.token_logprobs == [None, -1.21]
        assert "".join(choice.text for choice in choices) == "xyabc"
        lists = [choice.logprobs for choice in choices if choice.logprobs]
        assert [token for each in lists for token in each.tokens] == list("xyabc")
        assert [offset for each in lists for offset in each.text_offset] == [0, 1, 2, 3, 4]


def test_a_text_can_be_scored_without_an_answer(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("abc"), scores=True)
    client = server.openai(strict=False)
    answer = client.completions.create(model="fake", prompt="xy", echo=True, logprobs=0, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("xy", "length", 0)
    assert choice.logprobs.token_logprobs == [None, -1.21]
    assert post(server, "completions", prompt="xy", max_tokens=0).status_code == 400


def test_echo_alone_needs_nothing_of_the_engine_and_is_not_searched_for_stop_texts(serve_fake, fakes) -> None:
    client = serve_fake(answer=fakes.says("ab.c")).openai()
    choice = client.completions.create(model="fake", prompt="x.y ", echo=True, stop=".").choices[0]
    assert (choice.text, choice.logprobs, choice.finish_reason) == ("x.y ab", None, "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": False, "top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": -1}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": 5}, "invalid_type", "logprobs"),
        ("chat/completions", {"messages": HELLO, "echo": True}, "unsupported_parameter", "echo"),
        ("chat/completions", {"messages": HELLO, "prompt_logprobs": 0}, "unsupported_parameter", "prompt_logprobs"),
        ("completions", {"prompt": "x", "logprobs": 6}, "invalid_value", "logprobs"),
        ("completions", {"prompt": "x", "logprobs": -1}, "invalid_value", "logprobs"),
        ("completions", {"prompt": "x", "logprobs": True}, "invalid_type", "logprobs"),
        ("completions", {"prompt": "x", "prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
        ("completions", {"prompt": "x", "echo": True, "logprobs": 1, "num_beams": 2}, "invalid_value", "echo"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(serve_fake, path: str, body, code: str, param: str, stream: bool) -> None:
    response = post(serve_fake(scores=True), path, stream=stream, **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_no_logprobs_is_said_in_the_older_ways_too(serve_fake) -> None:
    server = serve_fake(scores=True)
    for value in (None, False):
        assert post(server, "completions", prompt="x", logprobs=value).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_without_logprobs_says_so(serve_fake, stream: bool) -> None:
    server = serve_fake()
    for path, body in (("chat/completions", {"messages": HELLO, "logprobs": True}), ("completions", {"prompt": "x", "logprobs": 0})):
        error = post(server, path, stream=stream, **body)
        assert (error.status_code, error.json()["error"]["param"]) == (400, "logprobs")
        assert error.json()["error"]["code"] == "unsupported_parameter"


def test_what_the_server_adds_to_a_prompt_is_never_among_the_entries(serve_fake, fakes) -> None:
    secret = fakes.make_artifact(system_prompt="be kind")
    server = serve_fake(artifact=secret, answer=fakes.says("ok"), scores=True, collection="bank")
    whole = post(server, "chat/completions", messages=HELLO, logprobs=True, top_logprobs=20).json()
    assert [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]] == ["o", "k"]
    echoed = post(server, "completions", prompt="x", echo=True, logprobs=5).json()
    assert echoed["choices"][0]["text"] == "xok"


def test_a_stream_with_logprobs_ends_as_any_other(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 400), token_delay_s=0.005, fail_after_tokens=20, scores=True)
    lines = [line for line in post(server, "chat/completions", messages=HELLO, logprobs=True, stream=True).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["code"] == "engine_stopped"
