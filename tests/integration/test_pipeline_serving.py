"""A served model in two processes, by layers or inside them: when one dies, clients hear it at once and both are rebuilt as one unit."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from r1ray.serve.config import AppArgs

pytestmark = pytest.mark.ray

NUM_CLIENTS = 6  # on four slots: two wait
AT_ONCE_S = 5.0  # generous, since the machine may be busy; the engine's own time limit for a silent stage is 300 s
REBUILT_S = 90.0
BODY = {"model": "split", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": True, "ignore_eos": True}

ENGINE = {"dtype": "float32", "num_slots": 4, "num_threads": 1, "stages": 2, "stage_cpus": 0.5, "kv_cache_gb": 0.01}
MODEL = {"id": "split", "ref": "split-tiny@production", "collection": "", "placement": {"num_cpus": 0.5}, "follow_interval_s": 0.5}


@dataclass(frozen=True)
class Deployed:
    url: str
    registry: Any
    second: Path

    def post(self) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**BODY, "stream": False, "max_tokens": 8}, timeout=REBUILT_S)

    @property
    def load(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/load", timeout=30).json()["split"]


@pytest.fixture(scope="module")
def deployed(ray_cluster, tiny_llama: Path, tiny_qwen2: Path) -> Iterator[Deployed]:
    from ray import serve

    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.serve.app import build

    registry = Registry(ray_cluster.settings)
    registry.promote(import_model(str(tiny_llama), name="split-tiny", registry=registry).ref)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(AppArgs.model_validate({"models": [{**MODEL, "engine": ENGINE}]})), name="r1ray", route_prefix="/")
    yield Deployed(f"http://127.0.0.1:{port}", registry, tiny_qwen2)
    serve.shutdown()


def stage_pids() -> list[int]:
    """Of the stage actors that live."""
    from ray.util.state import list_actors

    return [actor.pid for actor in list_actors(filters=[("class_name", "=", "StageActor"), ("state", "=", "ALIVE")], detail=True)]


def num_groups() -> int:
    """Placement groups that still hold bundles."""
    import ray

    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


@dataclass
class Load:
    """What clients that ask again and again saw: how each request ended, when it began and when it ended."""

    outcomes: list[tuple[str, float, float]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, url: str) -> None:
        while not self.stop.is_set():
            begun = time.monotonic()
            how = one_request(url)
            self.outcomes.append((how, begun, time.monotonic()))
            if how != "answered":
                time.sleep(0.1)

    def num_answered(self, *, begun_after: float) -> int:
        return sum(how == "answered" and begun > begun_after for how, begun, _ in self.outcomes)


def one_request(url: str) -> str:
    """`answered`, `refused CODE` (an error status), `cut CODE` (an error object in the stream), or what must never happen."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=REBUILT_S) as response:
        if response.status_code != 200:
            return f"refused {json.loads(response.read())['error']['code']}"
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if lines[-1] != "[DONE]":
        return "silent"
    last = json.loads(lines[-2])
    if "error" in last:
        return f"cut {last['error']['code']}"
    return "answered" if last["choices"][0]["finish_reason"] == "length" else "unfinished"


@contextmanager
def under_load(url: str) -> Iterator[Load]:
    load = Load()
    threads = [threading.Thread(target=load.ask, args=(url,)) for _ in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        assert wait_until(lambda: load.num_answered(begun_after=0) >= NUM_CLIENTS, 60), load.outcomes
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(REBUILT_S)


@pytest.mark.parametrize("victim", ["stage", "replica"])
def test_a_death_under_load_is_an_error_object_at_once_and_the_replica_is_rebuilt_whole(deployed: Deployed, victim: str) -> None:
    before, replica, (stage,) = (num_groups(), free_cpus()), deployed.load["pid"], stage_pids()
    with under_load(deployed.url) as load:
        killed_at = time.monotonic()
        os.kill(stage if victim == "stage" else replica, signal.SIGKILL)
        rebuilt = wait_until(lambda: load.num_answered(begun_after=killed_at + AT_ONCE_S) >= NUM_CLIENTS, REBUILT_S)
    assert rebuilt, load.outcomes[-20:]
    hit = [(how, ended - killed_at) for how, begun, ended in load.outcomes if begun < killed_at < ended]
    assert any(how.startswith("cut") for how, _ in hit), hit
    assert all(seconds < AT_ONCE_S for how, seconds in hit if how != "answered"), hit
    known = {"answered", *(f"{way} {code}" for way in ("cut", "refused") for code in ("engine_stopped", "replica_lost"))}
    assert {how for how, _, _ in load.outcomes} <= known
    assert deployed.load["pid"] != replica
    assert wait_until(lambda: stage not in stage_pids() and len(stage_pids()) == 1, 30), "one stage actor, and a new one"
    assert wait_until(lambda: (num_groups(), free_cpus()) == before, 30), f"{(num_groups(), free_cpus())} instead of {before}"


def test_a_beam_search_runs_over_the_stages(deployed: Deployed) -> None:
    body = {**BODY, "stream": False, "max_tokens": 12, "num_beams": 3}
    answers = [httpx.post(f"{deployed.url}/v1/chat/completions", json=body, timeout=60).json() for _ in range(2)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [12, 12]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


def test_a_stage_that_dies_while_nobody_asks_is_replaced_all_the_same(deployed: Deployed) -> None:
    replica, (stage,) = deployed.load["pid"], stage_pids()
    os.kill(stage, signal.SIGKILL)
    assert wait_until(lambda: [pid for pid in stage_pids() if pid != stage] != [], REBUILT_S)
    assert deployed.post().status_code == 200
    assert deployed.load["pid"] != replica


def test_a_promotion_loads_the_new_version_beside_the_old_one_in_the_same_bundles(deployed: Deployed) -> None:
    from r1ray.model.importer import import_model

    before, replica, (stage,) = (num_groups(), free_cpus()), deployed.load["pid"], stage_pids()
    new = import_model(str(deployed.second), name="split-tiny", registry=deployed.registry)
    deployed.registry.promote(new.ref)
    assert wait_until(lambda: deployed.load["ref"] == new.ref, REBUILT_S)
    assert deployed.post().status_code == 200
    assert deployed.load["pid"] == replica
    assert wait_until(lambda: stage not in stage_pids() and len(stage_pids()) == 1, 30), "the old version's stage is gone"
    assert (num_groups(), free_cpus()) == before


def test_a_replica_of_tensor_ranks_answers_as_the_stages_do(deployed: Deployed) -> None:
    from ray import serve

    from r1ray.serve.app import build

    body, replica = {**BODY, "stream": False, "temperature": 0, "max_tokens": 12}, deployed.load["pid"]
    by_stages = httpx.post(f"{deployed.url}/v1/chat/completions", json=body, timeout=REBUILT_S).json()
    engine = {**ENGINE, "stages": 1, "tensor_parallel": 2}
    serve.run(build(AppArgs.model_validate({"models": [{**MODEL, "engine": engine}]})), name="r1ray", route_prefix="/")
    assert deployed.load["pid"] != replica and len(stage_pids()) == 1, "another replica, with one further rank"
    by_ranks = httpx.post(f"{deployed.url}/v1/chat/completions", json=body, timeout=REBUILT_S).json()
    assert by_ranks["choices"] == by_stages["choices"]
    assert by_ranks["usage"]["completion_tokens"] == 12
