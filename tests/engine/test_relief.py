"""A pass that does not fit into the memory costs time, not answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from r1ray.engine import relief
from r1ray.engine.backend import Piece
from r1ray.engine.batching import BatchingEngine
from r1ray.engine.config import EngineConfig
from r1ray.engine.paged import TransformersBackend
from r1ray.errors import GenerationFailed
from tests.engine.conftest import lively, prompts, tokens, wanted

PROMPTS = [tuple(range(30 + i, 90 + 3 * i)) for i in range(4)]


class Scarce(TransformersBackend):
    """Refuses a pass of which `refuses` says so, as a full GPU would."""

    def __init__(self, model: Any, refuses: Callable[[Sequence[Piece]], bool], error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__(model, num_blocks=64)
        self._refuses, self._error = refuses, error
        self.refused: list[Sequence[Piece]] = []

    def submit(self, pieces: Sequence[Piece]) -> object:
        if self._refuses(pieces):
            self.refused.append(pieces)
            raise self._error("CUDA out of memory.")
        return super().submit(pieces)


async def answers(backend: Any, requests: Sequence[Any]) -> tuple[list[Any], BatchingEngine]:
    config = EngineConfig(num_threads=1, dtype="float32", num_slots=4, prefill_chunk=64)
    engine = BatchingEngine(backend, config, context_length=512)
    await engine.start()
    try:
        return await asyncio.gather(*(tokens(engine, request) for request in requests), return_exceptions=True), engine
    finally:
        await engine.stop()


def requests() -> list[Any]:
    return [wanted(str(i), prompt, max_tokens=8) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_pass_that_did_not_fit_once_is_computed_again(error: type[Exception], tiny_llama: Path, reference: Any) -> None:
    calls = iter([False, True])
    backend = Scarce(lively(tiny_llama), lambda _: next(calls, False), error)
    found, engine = asyncio.run(answers(backend, requests()))
    assert len(backend.refused) == 1
    assert found == [reference(tiny_llama, prompt, 8) for prompt in PROMPTS]
    assert engine.stats().num_failed == 0


@pytest.mark.parametrize("most", [40, 2])
def test_passes_shrink_until_they_fit(most: int, tiny_llama: Path, reference: Any) -> None:
    """40 tokens: prompts come in smaller pieces. Two rows: the youngest streams wait."""

    def refuses(pieces: Sequence[Piece]) -> bool:
        return sum(len(piece.ids) for piece in pieces) > 40 if most == 40 else len(pieces) > most

    backend = Scarce(lively(tiny_llama), refuses)
    found, engine = asyncio.run(answers(backend, requests()))
    assert backend.refused
    assert found == [reference(tiny_llama, prompt, 8) for prompt in PROMPTS]
    assert (engine.stats().num_preempted > 0) == (most == 2)


def test_only_the_stream_that_does_not_fit_alone_fails(tiny_llama: Path, reference: Any) -> None:
    long = wanted("long", prompts(1, seed=9, longest=1)[0] * 100, max_tokens=8)
    backend = Scarce(lively(tiny_llama), lambda pieces: any(piece.start + len(piece.ids) > 75 for piece in pieces))
    found, engine = asyncio.run(answers(backend, [*requests()[:2], long]))
    assert found[:2] == [reference(tiny_llama, prompt, 8) for prompt in PROMPTS[:2]]
    assert isinstance(found[2], GenerationFailed)
    assert "Request long: its" in str(found[2]) and "CUDA out of memory" in str(found[2])
    assert engine.stats().state == "stopped"


def test_larger_passes_are_tried_again_when_many_have_fitted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "RECOVERY_STEPS", 3)
    calls = iter([False, True, True, True])
    backend = Scarce(lively(tiny_llama), lambda _: next(calls, False))
    _, engine = asyncio.run(answers(backend, [wanted(str(i), prompt, max_tokens=40) for i, prompt in enumerate(PROMPTS)]))
    assert len(backend.refused) == 3
    assert (engine._core.scheduler.most_tokens, engine._core.scheduler.most_streams) == (256, 4)
