"""The HTTP face as clients see it: OpenAI's own client in strict mode, and raw requests where the wire itself matters."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise

import httpx2 as httpx
import pytest

from r1ray.types import Sampling, SamplingPolicy

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
HELLO = [{"role": "user", "content": "你好"}]


def events(response: httpx.Response) -> list:
    """The data of every server-sent event."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=20)


def wait_until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_strict_client_reads_a_chat_answer(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("先想</think>\n\n答案 42"), thinks=True)
    answer = server.openai().chat.completions.create(model="fake", messages=HELLO)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("答案 42", "先想", "先想")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("先想</think>\n\n答案 42".encode())
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("先想</think>".encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint == "fake@1"


def test_a_strict_client_reads_a_stream(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("先想</think>\n\n答案"), thinks=True)
    stream = server.openai().chat.completions.create(model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "先想"
    assert "".join(delta.content or "" for delta in deltas) == "答案"
    assert all(delta.content is None for delta in deltas if getattr(delta, "reasoning", None))
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("先想</think>\n\n答案".encode())


def test_a_stream_without_usage_asked_for_shows_none_but_is_metered(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("abc"))
    response = post(server, "/v1/chat/completions", model="fake", messages=HELLO, stream=True)
    found = events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert found[-1] == "[DONE]" and all("usage" not in chunk for chunk in found[:-1])
    assert wait_until(lambda: server.sink.records)
    record = server.sink.records[0]
    assert (record.outcome, record.num_completion_tokens, record.ref, record.model) == ("stop", 3, "fake@1", "fake")


def test_completions_take_text_lists_and_token_ids(serve_fake) -> None:
    server = serve_fake()  # the engine echoes
    client = server.openai()
    assert client.completions.create(model="fake", prompt="abc").choices[0].text == "abc"
    many = client.completions.create(model="fake", prompt=["abc", "de"], n=2)
    assert [choice.text for choice in many.choices] == ["abc", "abc", "de", "de"]
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (5, 10)
    assert client.completions.create(model="fake", prompt=[104, 105]).choices[0].text == "hi"


def test_streamed_completions_have_a_null_finish_reason_until_the_end(serve_fake) -> None:
    # as OpenAI's server sends it; the strict client's type for the body knows no null, so it cannot read any server's stream here
    client = serve_fake().openai(strict=False)
    chunks = list(client.completions.create(model="fake", prompt="abc", stream=True))
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc" and chunks[-1].choices[0].finish_reason == "stop"


def test_several_choices_stream_under_their_index(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("abcdef"), token_delay_s=0.002)
    stream = server.openai().chat.completions.create(model="fake", messages=HELLO, n=3, stream=True)
    texts, ends = {0: "", 1: "", 2: ""}, set()
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends |= {choice.index} if choice.finish_reason else set()
    assert texts == {0: "abcdef", 1: "abcdef", 2: "abcdef"} and ends == {0, 1, 2}


def test_fields_of_many_clients_are_understood(serve_fake) -> None:
    server = serve_fake()
    response = post(
        server,
        "/v1/chat/completions",
        model="fake",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]},
            {"role": "assistant", "content": None, "reasoning_content": "hm"},
            {"role": "user", "content": "two"},
        ],
        max_completion_tokens=2048,
        stop=None,
        temperature=None,
        top_k=-1,
        chat_template_kwargs={"x": 1},
        an_unknown_field={"a": []},
        stream_options=None,
    )
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "<system>be brief<user>one<assistant><user>two<assistant>"


@pytest.mark.parametrize(("stop", "expected"), [("!", "hello"), (["xx", "lo"], "hel"), ([], "hello! you")])
def test_stop_texts_are_not_returned(serve_fake, fakes, stop, expected: str) -> None:
    server = serve_fake(answer=fakes.says("hello! you"))
    answer = server.openai().chat.completions.create(model="fake", messages=HELLO, stop=stop)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"


def test_max_tokens_cuts_with_reason_length(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("hello"))
    choice = server.openai().chat.completions.create(model="fake", messages=HELLO, max_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("he", "length")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "other", "messages": HELLO}, 404, "model_not_found", "model"),
        ({"model": "fake", "messages": []}, 400, "invalid_type", "messages"),
        ({"model": "fake"}, 400, "missing_required_parameter", "messages"),
        ({"model": "fake", "messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_type", "messages.0.role"),
        ({"model": "fake", "messages": HELLO, "temperature": 9}, 400, "invalid_value", "temperature"),
        ({"model": "fake", "messages": HELLO, "temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"model": "fake", "messages": HELLO, "n": 99}, 400, "invalid_value", "n"),
        ({"model": "fake", "messages": HELLO, "best_of": 3}, 400, "unsupported_parameter", "best_of"),
        ({"model": "fake", "messages": HELLO, "logit_bias": {"5": 200}}, 400, "invalid_value", "logit_bias"),
        ({"model": "fake", "messages": HELLO, "logit_bias": {"yes": 1}}, 400, "invalid_type", "logit_bias.yes.[key]"),
        ({"model": "fake", "messages": HELLO, "tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"model": "fake", "messages": [{"role": "user", "content": "x" * 5000}]}, 400, "context_length_exceeded", "messages"),
        (
            {"model": "fake", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "invalid_value",
            "messages",
        ),
        ([1], 400, "invalid_type", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_get_openai_errors_before_any_200(serve_fake, body, status, code, param, stream: bool) -> None:
    body = body | {"stream": stream} if isinstance(body, dict) else body
    response = httpx.post(f"{serve_fake().url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"}


def test_broken_json_and_unknown_routes_are_openai_errors(serve_fake) -> None:
    server = serve_fake()
    broken = httpx.post(f"{server.url}/v1/chat/completions", content=b"{")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_429_with_retry_after(serve_fake, fakes, stream: bool) -> None:
    server = serve_fake(answer=fakes.says("x" * 400), token_delay_s=0.005, num_slots=1, max_waiting=0)
    body = {"model": "fake", "messages": HELLO}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}) as first:
        assert first.status_code == 200
        refused = post(server, "/v1/chat/completions", **body, stream=stream)
    assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (429, "queue_full", "1")


def test_choices_are_admitted_together_or_not_at_all(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 400), token_delay_s=0.005, num_slots=1, max_waiting=0)
    refused = post(server, "/v1/chat/completions", model="fake", messages=HELLO, n=2, stream=True)
    assert refused.status_code == 429
    assert wait_until(lambda: server.engine.stats().num_running == 0, 1)


def test_a_request_that_does_not_start_in_time_is_a_503_and_leaves_the_engine(serve_fake) -> None:
    server = serve_fake(token_delay_s=5.0, router={"first_token_timeout_s": 0.1})
    late = post(server, "/v1/chat/completions", model="fake", messages=HELLO, stream=True)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "start_timeout") and "retry-after" in late.headers
    assert wait_until(lambda: server.engine.stats().num_running == 0, 1)


def test_an_engine_that_dies_midstream_is_an_error_object_then_done(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 400), token_delay_s=0.005, fail_after_tokens=20)
    found = events(post(server, "/v1/chat/completions", model="fake", messages=HELLO, stream=True))
    assert found[-1] == "[DONE]" and found[-2]["error"]["code"] == "engine_stopped"
    assert len(found) > 3
    after = post(server, "/v1/chat/completions", model="fake", messages=HELLO, stream=True)
    assert (after.status_code, after.json()["error"]["code"]) == (503, "engine_stopped")
    assert httpx.get(f"{server.url}/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve_fake, fakes, stream: bool) -> None:
    server = serve_fake(answer=fakes.says("x" * 4000), token_delay_s=0.005, context_length=8192)
    with httpx.Client() as client:
        body = {"model": "fake", "messages": HELLO, "stream": stream, "max_tokens": 4000}
        if stream:
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                assert server.engine.stats().num_running == 1
        else:
            with pytest.raises(httpx.TimeoutException):
                client.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    assert wait_until(lambda: server.engine.stats().num_running == 0, 2)
    assert wait_until(lambda: server.sink.records)
    assert server.sink.records[0].outcome == "aborted" and server.sink.records[0].num_completion_tokens > 0


def test_two_streams_progress_together(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 60), token_delay_s=0.005)
    arrivals: list[int] = []

    def read(number: int) -> None:
        for chunk in server.openai().chat.completions.create(model="fake", messages=HELLO, stream=True):
            if chunk.choices[0].delta.content:
                arrivals.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    switches = sum(a != b for a, b in pairwise(arrivals))
    assert {0, 1} == set(arrivals) and switches > 5


def test_request_ids_are_echoed_or_made(serve_fake) -> None:
    server = serve_fake()
    given = httpx.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": "a"}, headers={"X-Request-Id": "mine"})
    assert given.headers["x-request-id"] == "mine" and server.sink.records[0].request_id == "mine"
    assert httpx.get(f"{server.url}/v1/nothing").headers["x-request-id"].startswith("req-")


def test_models_health_version_and_load(serve_fake) -> None:
    server = serve_fake()
    client = server.openai()
    (model,) = client.models.list().data
    assert (model.id, model.created, model.owned_by, model.root, model.max_model_len) == ("fake", 1, "r1ray", "fake@1", 2048)
    assert client.models.retrieve("fake").id == "fake"
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.content) == (200, b"")
    assert "version" in httpx.get(f"{server.url}/version").json()
    assert httpx.get(f"{server.url}/load").json()["fake"]["num_free_slots"] == 8


def test_tokenize_and_back(serve_fake) -> None:
    server = serve_fake()
    found = post(server, "/tokenize", prompt="hi").json()
    assert found == {"count": 2, "max_model_len": 2048, "tokens": [104, 105]}
    assert post(server, "/detokenize", tokens=[104, 105]).json() == {"prompt": "hi"}
    chat = post(server, "/tokenize", model="fake", messages=HELLO).json()
    assert post(server, "/detokenize", tokens=chat["tokens"]).json()["prompt"] == "<user>你好<assistant>"
    assert post(server, "/tokenize").status_code == 400


def test_task_comes_from_body_metadata_or_header(serve_fake, fakes) -> None:
    policy = SamplingPolicy(default=Sampling(max_tokens=5), tasks={"short": Sampling(max_tokens=2)})
    server = serve_fake(answer=fakes.says("abcdefgh"), artifact=fakes.make_artifact(policy=policy))

    def answer(headers=None, **body) -> str:
        response = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "fake", "messages": HELLO, **body}, headers=headers)
        return response.json()["choices"][0]["message"]["content"]

    assert answer() == "abcde"
    assert answer(task="short") == answer(metadata={"task": "short"}) == answer(headers={"X-Task": "short"}) == "ab"
    assert answer(task="short", max_tokens=3) == "abc"
    assert answer(task="unknown") == "abcde"


def test_passages_go_into_the_question_and_citations_come_back(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("5 天[citation:2]，见[citation:9]"), collection="bank")
    client = server.openai()
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.retrieved == ["p1", "p2"]
    assert answer.citations == [{"index": 2, "id": "p2", "source": "card.md", "heading": "Replacement"}]
    assert server.finder.queries == [("bank", "你好", 3)]
    *_, last = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    assert last.choices[0].finish_reason == "stop" and last.retrieved == ["p1", "p2"] and last.citations[0]["id"] == "p2"


def test_retrieval_shows_the_model_the_passages_and_can_be_switched_off(serve_fake) -> None:
    server = serve_fake(collection="bank")  # the engine echoes the prompt
    client = server.openai()
    grounded = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1000)
    assert "[webpage 1 begin]挂失请拨打热线。[webpage 1 end]" in grounded.choices[0].message.content
    plain = client.chat.completions.create(model="fake", messages=HELLO, extra_body={"retrieval": False})
    assert plain.choices[0].message.content == "<user>你好<assistant>" and not hasattr(plain, "retrieved")


def test_an_answer_over_its_time_ends_with_an_error_object(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 500), token_delay_s=0.01)
    found = events(post(server, "/v1/chat/completions", model="fake", messages=HELLO, stream=True, timeout=0.2))
    assert found[-1] == "[DONE]"
    assert {key: found[-2]["error"][key] for key in ("type", "code")} == {"type": "timeout", "code": "deadline_exceeded"}
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in found[:-2])
    whole = post(server, "/v1/completions", model="fake", prompt="abc", max_tokens=400, timeout=0.2)
    assert (whole.status_code, whole.json()["error"]["type"]) == (504, "timeout")
    assert wait_until(lambda: server.engine.stats().num_running == 0)
    assert [record.outcome for record in server.sink.records] == ["deadline_exceeded"] * 2


def test_the_services_own_limit_holds_for_a_request_that_waits_and_is_not_lifted_by_it(serve_fake, fakes) -> None:
    server = serve_fake(answer=fakes.says("x" * 500), token_delay_s=0.01, num_slots=1, router={"request_timeout_s": 0.4})
    blocker = threading.Thread(target=post, args=(server, "/v1/completions"), kwargs={"model": "fake", "prompt": "a", "max_tokens": 400})
    blocker.start()
    assert wait_until(lambda: server.engine.stats().num_running == 1)
    began = time.monotonic()
    waiting = post(server, "/v1/completions", model="fake", prompt="abc", timeout=0.1)
    assert waiting.status_code == 504 and time.monotonic() - began < 0.4
    blocker.join()
    longer = post(server, "/v1/completions", model="fake", prompt="abc", max_tokens=400, timeout=60)
    assert longer.status_code == 504 and "0.4 s" in longer.json()["error"]["message"]
    assert post(server, "/v1/completions", model="fake", prompt="abc", timeout=0).json()["error"]["param"] == "timeout"
