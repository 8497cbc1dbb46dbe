"""The deployed application: real Serve, a real (tiny) model on the real engine, a real index, the strict OpenAI client."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from r1ray.serve.config import AppArgs

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
LONG = "word " * 60  # the fake engine echoes: some 250 tokens at 30 ms each


@dataclass(frozen=True)
class Deployed:
    """The running application and the registry that it follows."""

    url: str
    registry: Any
    second: Path

    def openai(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True)

    def load(self, model: str) -> dict[str, Any]:
        return httpx.get(f"{self.url}/load", timeout=30).json()[model]


@pytest.fixture(scope="module")
def deployed(ray_cluster, tiny_llama: Path, tiny_qwen2: Path, tmp_path_factory) -> Iterator[Deployed]:
    from ray import serve

    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.serve.app import build

    registry = Registry(ray_cluster.settings)
    registry.promote(import_model(str(tiny_llama), name="served-tiny", registry=registry).ref)
    export()
    adapt(registry, tmp_path_factory.mktemp("adapter"))
    index(ray_cluster.settings, tmp_path_factory.mktemp("knowledge"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(arguments()), name="r1ray", route_prefix="/")
    yield Deployed(f"http://127.0.0.1:{port}", registry, tiny_qwen2)
    serve.shutdown()


def index(settings, folder: Path) -> None:
    from r1ray.retrieval.config import IndexConfig
    from r1ray.retrieval.index import build_index

    (folder / "cards.md").write_text("# Lost card\n\nCall the hotline to block a lost credit card at once.\n", encoding="utf-8")
    build_index(IndexConfig(collection="served", sources=(str(folder),), embedding="none"), settings)


def export() -> None:
    """served-edge@1 by the command that a user gives."""
    import runpy

    job = runpy.run_path(str(ROOT / "jobs" / "export_onnx.py"))
    parity = ["parity.num_tokens=600", "parity.num_prompts=2", "parity.num_new=8"]
    arguments = ["model=served-tiny", "name=served-edge", "precision=float32", *parity]
    assert job["entry"].run(job["ExportOnnxConfig"], job["__doc__"], job["export"], arguments) == 0


def adapt(registry, folder: Path) -> None:
    """served-adapter@1 on served-tiny@1."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from r1ray.model.importer import import_model

    base = registry.resolve("served-tiny@1")
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), settings).save_pretrained(folder)
    import_model(str(folder), name="served-adapter", base=base.ref, registry=registry)


def arguments() -> AppArgs:
    shared = {"ref": "served-tiny@production", "follow_interval_s": 0.5, "placement": {"num_cpus": 0.2}}
    adapters = [{"id": "adapted", "ref": "served-adapter@1", "collection": ""}]
    slow = {"type": "fake", "num_slots": 2, "max_waiting": 0, "fake": {"token_delay_s": 0.03}}
    exact = {"num_slots": 4, "num_threads": 1}
    return AppArgs.model_validate(
        {
            "models": [
                {"id": "tiny", "engine": {"type": "torch", "dtype": "float32", **exact}, "collection": "served", **shared},
                {"id": "slow", "engine": slow, "collection": "", **shared},
                {"id": "edge", "engine": {"type": "onnx", **exact}, "collection": "", **shared, "ref": "served-edge@1"},
                {"id": "base", "engine": {"type": "fake"}, "collection": "", **shared, "ref": "served-tiny@1", "adapters": adapters},
            ],
            "retrieval": {"style": "compact"},
        }
    )


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_strict_client_gets_answers_streams_and_models(deployed: Deployed) -> None:
    client = deployed.openai()
    messages = [{"role": "user", "content": "你好"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 20, "extra_body": {"retrieval": False, "ignore_eos": True}}
    answer = client.chat.completions.create(**options)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (20, "length")
    assert answer.system_fingerprint == "served-tiny@1"
    greedy = {**options, "temperature": 0}
    chunks = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == client.chat.completions.create(**greedy).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 20
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=3).object == "text_completion"
    scored = list(client.chat.completions.create(**greedy, stream=True, logprobs=True, top_logprobs=2))
    entries = [entry for chunk in scored if (found := chunk.choices[0].logprobs) for entry in found.content]
    assert len(entries) == 20 and all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in entries)
    with pytest.raises(openai.BadRequestError, match="gives no logprobs"):
        client.chat.completions.create(model="base", messages=messages, logprobs=True)
    assert [model.id for model in client.models.list().data] == ["tiny", "slow", "edge", "base", "adapted"]
    health = httpx.get(f"{deployed.url}/health", timeout=30, headers={"X-Request-Id": "mine"})
    assert (health.status_code, health.headers.get_list("x-request-id")) == (200, ["mine"])


def test_an_export_for_onnx_runtime_streams_what_the_torch_engine_answers(deployed: Deployed) -> None:
    client = deployed.openai()
    messages = [{"role": "user", "content": "I lost my credit card, please block it today."}]
    options = {"messages": messages, "max_tokens": 24, "temperature": 0, "extra_body": {"retrieval": False, "ignore_eos": True}}
    right = client.chat.completions.create(model="tiny", **options)
    chunks = list(client.chat.completions.create(model="edge", stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == right.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 24
    assert client.chat.completions.create(model="edge", **options).system_fingerprint == "served-edge@1"


def test_answers_name_the_passages_they_were_given(deployed: Deployed) -> None:
    question = [{"role": "user", "content": "How do I block a lost card?"}]
    answer = deployed.openai().chat.completions.create(model="tiny", messages=question, max_tokens=4)
    assert len(answer.retrieved) == 1 and answer.citations == []
    plain = deployed.openai().chat.completions.create(model="tiny", messages=question, max_tokens=4, extra_body={"retrieval": False})
    assert plain.usage.prompt_tokens < answer.usage.prompt_tokens


def test_two_clients_stream_at_once(deployed: Deployed) -> None:
    arrivals: list[int] = []

    def read(number: int) -> None:
        options = {"model": "slow", "messages": [{"role": "user", "content": LONG}], "max_tokens": 60}
        for chunk in deployed.openai().chat.completions.create(**options, stream=True):
            if chunk.choices[0].delta.content:
                arrivals.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(arrivals) == {0, 1}
    assert sum(a != b for a, b in pairwise(arrivals)) > 5


def body(stream: bool) -> dict[str, Any]:
    return {"model": "slow", "messages": [{"role": "user", "content": LONG}], "max_tokens": 400, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_frees_its_slot(deployed: Deployed, stream: bool) -> None:
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{deployed.url}/v1/chat/completions", json=body(True), timeout=30) as response:
                lines = response.iter_lines()
                next(lines)
                assert deployed.load("slow")["num_running"] == 1
        else:
            with pytest.raises(httpx.TimeoutException):
                client.post(f"{deployed.url}/v1/chat/completions", json=body(False), timeout=1)
    assert wait_until(lambda: deployed.load("slow")["num_free_slots"] == 2, 2)


def test_more_than_the_engine_admits_is_a_429(deployed: Deployed) -> None:
    streams = [httpx.stream("POST", f"{deployed.url}/v1/chat/completions", json=body(True), timeout=30) for _ in range(2)]
    try:
        assert [stream.__enter__().status_code for stream in streams] == [200, 200]
        refused = httpx.post(f"{deployed.url}/v1/chat/completions", json=body(True), timeout=30)
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert refused.headers["retry-after"] == "1"


def test_an_adapter_is_a_model_of_its_own_on_its_bases_replica(deployed: Deployed) -> None:
    client = deployed.openai()
    options = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    answers = [client.chat.completions.create(model=name, **options) for name in ("base", "adapted")]
    assert [answer.system_fingerprint for answer in answers] == ["served-tiny@1", "served-adapter@1"]
    card = client.models.retrieve("adapted")
    assert (card.root, card.parent) == ("served-adapter@1", "base")
    assert set(httpx.get(f"{deployed.url}/load", timeout=30).json()) == {"tiny", "slow", "edge", "base"}


def test_an_answer_over_its_time_ends_with_an_error_object(deployed: Deployed) -> None:
    response = httpx.post(f"{deployed.url}/v1/chat/completions", json=body(True) | {"timeout": 1.0}, timeout=30)
    lines = [line for line in response.text.splitlines() if line]
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert (lines[-1], error["type"], error["code"]) == ("data: [DONE]", "timeout", "deadline_exceeded")
    assert wait_until(lambda: deployed.load("slow")["num_free_slots"] == 2, 2)


def test_a_promotion_is_followed_without_a_restart(deployed: Deployed) -> None:
    from r1ray.model.importer import import_model

    before = deployed.load("tiny")
    new = import_model(str(deployed.second), name="served-tiny", registry=deployed.registry)
    with httpx.stream("POST", f"{deployed.url}/v1/chat/completions", json=body(True), timeout=60) as running:
        lines = running.iter_lines()
        next(lines)
        deployed.registry.promote(new.ref)
        assert wait_until(lambda: deployed.load("tiny")["ref"] == new.ref and deployed.load("slow")["ref"] == new.ref, 30)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert deployed.load("tiny")["pid"] == before["pid"]
    answer = deployed.openai().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert answer.system_fingerprint == new.ref


def test_a_replica_killed_midstream_is_an_error_object_and_then_served_again(deployed: Deployed) -> None:
    pid = deployed.load("slow")["pid"]
    with httpx.stream("POST", f"{deployed.url}/v1/chat/completions", json=body(True), timeout=60) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        first = [next(lines) for _ in range(5)]
        os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert first[0].startswith("data: ") and rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["code"] == "replica_lost" and set(error) == {"message", "type", "param", "code"}
    again = deployed.openai().chat.completions.create(model="slow", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert again.choices[0].finish_reason in ("stop", "length") and deployed.load("slow")["pid"] != pid


@pytest.mark.slow
def test_load_is_zero_for_a_sleeping_model_and_lets_it_sleep(deployed: Deployed) -> None:
    from ray import serve

    from r1ray.serve.app import build

    sleepy = {"min_replicas": 0, "upscale_delay_s": 0, "downscale_delay_s": 1}
    model = {"id": "sleepy", "ref": "served-tiny@1", "engine": {"type": "fake"}, "collection": "", "autoscaling": sleepy}
    serve.run(build(AppArgs.model_validate({"models": [model | {"placement": {"num_cpus": 0.2}}]})), name="sleepy", route_prefix="/sleepy")
    beside = Deployed(f"{deployed.url}/sleepy", deployed.registry, deployed.second)
    try:
        assert wait_until(lambda: beside.load("sleepy")["num_slots"] == 0, 60)
        for _ in range(8):
            time.sleep(0.5)
            assert (beside.load("sleepy")["num_slots"], beside.load("sleepy")["ref"]) == (0, "")
        assert httpx.get(f"{beside.url}/health", timeout=30).status_code == 200
        woken = beside.openai().chat.completions.create(model="sleepy", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        assert woken.system_fingerprint == "served-tiny@1"
    finally:
        serve.delete("sleepy")
