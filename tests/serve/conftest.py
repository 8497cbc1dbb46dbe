"""The whole server without Ray and without a model: ChatService and its HTTP face over a FakeEngine, under uvicorn on a free port."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from r1ray.engine.config import EngineConfig, FakeConfig
from r1ray.engine.fake import FakeEngine, echo
from r1ray.engine.protocol import GenerationRequest, TokenChunk, TokenLogprobs
from r1ray.serve.api import create_api
from r1ray.serve.chat import Card, ChatService, Served
from r1ray.serve.config import AppArgs, ModelArgs, RetrievalArgs, RouterArgs
from r1ray.serve.grounding import Grounding
from r1ray.serve.host import LoadedVersion, ModelHost
from r1ray.serve.meter import GenerationRecord, Meter
from r1ray.types import Artifact, Manifest, Message, Passage, SamplingPolicy, TemplateInfo

PASSAGES = [
    Passage(id="p1", text="挂失请拨打热线。", source="card.md", heading="挂失"),
    Passage(id="p2", text="Cards are replaced in 5 days.", source="card.md", heading="Replacement"),
]
Answer = Callable[[GenerationRequest], Sequence[int]]


class ByteCodec:
    """One token per UTF-8 byte, so that every Chinese character takes three tokens. `thinks` prefills <think>."""

    def __init__(self, *, thinks: bool = False) -> None:
        self._thinks = thinks

    def render(self, messages: Sequence[Message]) -> list[int]:
        text = "".join(f"<{message.role}>{message.content}" for message in messages)
        return self.encode(text + "<assistant>" + ("<think>\n" if self._thinks else ""))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def piece(self, token_id: int) -> bytes:
        return bytes([token_id])

    def thinking(self, prompt_ids: Sequence[int]) -> bool:
        return self.decode(prompt_ids).endswith("<think>\n")


def says(text: str) -> Answer:
    """An engine's answer, whatever the question."""
    return lambda _request: list(text.encode())


class ScoringEngine(FakeEngine):
    """A FakeEngine that gives log-probabilities, which the token ids alone decide (`likelihood`)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.capabilities |= {"logprobs", "prompt_logprobs"}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        is_first = True
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield scored(request, chunk, is_first=is_first)
                is_first = False


def scored(request: GenerationRequest, chunk: TokenChunk, *, is_first: bool) -> TokenChunk:
    if request.num_logprobs is not None:
        chunk = dataclasses.replace(chunk, logprobs=tuple(likelihood(token, request.num_logprobs) for token in chunk.token_ids))
    if request.prompt_logprobs and is_first:
        found = [likelihood(token, request.num_prompt_logprobs) for token in request.prompt_ids[1:]]
        top = tuple(each.top for each in found) if request.num_prompt_logprobs else ()
        chunk = dataclasses.replace(chunk, prompt_logprobs=tuple(each.logprob for each in found), prompt_top=top)
    return chunk


def likelihood(token: int, num: int) -> TokenLogprobs:
    """The token with -id / 100; it is the likeliest, and every next id is less likely by one."""
    top = tuple(((token + step) % 256, -token / 100 - step) for step in range(num))
    return TokenLogprobs(token=token, logprob=-token / 100, top=top)


def make_artifact(version: int = 1, *, system_prompt: str | None = None, policy: SamplingPolicy | None = None) -> Artifact:
    manifest = Manifest(
        name="fake",
        kind="full",
        family="llama",
        weights_sha256="0" * 64,
        template=TemplateInfo(sha256="0" * 64),
        context_length=2048,
        num_parameters=0,
        system_prompt=system_prompt,
        created_at="2026-01-01T00:00:00+00:00",
    )
    return Artifact(path=Path("/nowhere"), manifest=manifest, version=version, policy=policy)


@dataclasses.dataclass
class Shelf:
    """The registry of a ModelHost in a test: change `artifact` to promote."""

    artifact: Artifact
    answer: Answer = echo
    thinks: bool = False
    scores: bool = False
    token_delay_s: float = 0.0
    fail_after_tokens: int | None = None
    num_slots: int = 8
    max_waiting: int = 256
    context_length: int = 2048
    broken: set[int] = dataclasses.field(default_factory=set)
    engines: list[FakeEngine] = dataclasses.field(default_factory=list)

    def find(self) -> Artifact:
        return self.artifact

    async def load(self, artifact: Artifact) -> LoadedVersion:
        if artifact.version in self.broken:
            raise OSError("its weights cannot be read")
        fake = FakeConfig(token_delay_s=self.token_delay_s, fail_after_tokens=self.fail_after_tokens)
        config = EngineConfig(type="fake", num_slots=self.num_slots, max_waiting=self.max_waiting, fake=fake)
        engine = (ScoringEngine if self.scores else FakeEngine)(config, answer=self.answer, context_length=self.context_length)
        await engine.start()
        self.engines.append(engine)
        return LoadedVersion(artifact, ByteCodec(thinks=self.thinks), engine)

    def host(self, **args: Any) -> ModelHost:
        return ModelHost(ModelArgs(id="fake", ref="fake@production", **args), self.find, self.load)


class FixedFinder:
    """Finds the same passages for everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.queries: list[tuple[str, str, int]] = []

    async def search(self, collection: str, query: str, k: int) -> list[Passage]:
        self.queries.append((collection, query, k))
        return PASSAGES[:k]


class MemorySink:
    """Keeps the meter's records."""

    def __init__(self) -> None:
        self.records: list[GenerationRecord] = []

    def record(self, generation: GenerationRecord) -> None:
        self.records.append(generation)


@dataclasses.dataclass
class Server:
    """A running server and what a test wants to look into."""

    url: str
    shelf: Shelf
    finder: FixedFinder
    sink: MemorySink

    @property
    def engine(self) -> FakeEngine:
        return self.shelf.engines[-1]

    def openai(self, *, strict: bool = True) -> Any:
        """The strict client refuses what is not exactly OpenAI's schema."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=strict)


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The stand-ins above; tests cannot import a conftest."""
    return SimpleNamespace(
        ByteCodec=ByteCodec,
        FixedFinder=FixedFinder,
        MemorySink=MemorySink,
        PASSAGES=PASSAGES,
        Shelf=Shelf,
        likelihood=likelihood,
        make_artifact=make_artifact,
        says=says,
    )


@pytest.fixture
def serve_fake() -> Iterator[Callable[..., Server]]:
    """serve_fake(answer=..., thinks=..., collection=...) -> a Server on a port of its own."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(*, collection: str | None = None, router: dict[str, Any] | None = None, **shelf: Any) -> Server:
        shelf.setdefault("artifact", make_artifact())
        store, finder, sink = Shelf(**shelf), FixedFinder(), MemorySink()
        app_args = AppArgs(
            models=(ModelArgs(id="fake", ref="fake"),), retrieval=RetrievalArgs(style="compact"), router=RouterArgs(**(router or {}))
        )
        model = store.host()
        card = Card(id="fake", created=1, root="fake@1", max_model_len=2048)
        service = ChatService({"fake": Served(card, model, collection)}, app_args, Meter([sink]), Grounding(finder, app_args.retrieval))
        asyncio.run(model.start())
        server, port = _listening(create_api(service))
        running.append(server)
        return Server(f"http://127.0.0.1:{port}", store, finder, sink)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


def _listening(api: Any) -> tuple[tuple[uvicorn.Server, threading.Thread], int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    return (server, thread), listener.getsockname()[1]
