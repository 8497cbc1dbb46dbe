"""Beam search gives the answer that transformers' own finds, in any company, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import copy
import functools
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from r1ray.engine.beam import Candidate, Ranking
from r1ray.engine.config import EngineConfig
from r1ray.engine.fake import FakeEngine
from r1ray.errors import EngineStopped, InvalidRequest, QueueFull
from tests.engine import conftest as kit

BACKENDS = pytest.mark.parametrize("backend", ["transformers", kit.native(), "onnx"])
NUM_NEW = 24


@functools.cache
def _softened(directory: Path):
    """Weights between the repeating ones as initialised and the lively ones, which are so sure that beams never differ."""
    model = kit.lively(directory)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.15)
    return model


def softened(directory: Path):
    """A copy: an engine's backend changes the model that it takes."""
    return copy.deepcopy(_softened(directory))


@functools.cache
def reference(directory: Path, prompt: tuple[int, ...], num_beams: int, length_penalty: float = 1.0, eos: int | None = None) -> list[int]:
    """transformers' answer, without its end token."""
    ids = torch.tensor([prompt])
    out = _softened(directory).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        num_beams=num_beams,
        do_sample=False,
        length_penalty=length_penalty,
        eos_token_id=eos,
        pad_token_id=0,
    )
    answer = out[0, len(prompt) :].tolist()
    return answer[: answer.index(eos)] if eos in answer else answer


def wanted(name: str, prompt: tuple[int, ...], num_beams: int, **rest):
    return kit.wanted(name, prompt, max_tokens=rest.pop("max_tokens", NUM_NEW), num_beams=num_beams, **rest)


def searched(directory: Path, requests, **settings):
    async def scenario():
        async with kit.running(softened(directory), **settings) as engine:
            answers = await asyncio.gather(*(kit.tokens(engine, request) for request in requests))
            await kit.until(lambda: engine.stats().num_free_slots == engine.config.num_slots)
            return answers, engine.stats()

    return asyncio.run(scenario())


@BACKENDS
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_the_answer_equals_transformers_beam_search(tiny_llama, backend, num_beams):
    asked = kit.prompts(4, seed=num_beams)
    expected = [reference(tiny_llama, prompt, num_beams) for prompt in asked]
    answers, stats = searched(tiny_llama, [wanted(str(i), p, num_beams) for i, p in enumerate(asked)], backend=backend, num_slots=16)
    assert answers == expected
    assert stats.num_free_blocks == stats.num_blocks


def test_it_finds_likelier_answers_than_the_greedy_one(tiny_llama):
    asked = kit.prompts(4, seed=5)
    assert any(reference(tiny_llama, prompt, 5) != reference(tiny_llama, prompt, 1) for prompt in asked)


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_deepseek_v3"])
def test_other_families_equal_transformers_too(family, request):
    directory = request.getfixturevalue(family)
    asked = kit.prompts(3, seed=1)
    answers, _ = searched(directory, [wanted(str(i), p, 3) for i, p in enumerate(asked)], num_slots=9)
    assert answers == [reference(directory, prompt, 3) for prompt in asked]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_answers_that_end_compete_by_their_length_as_in_transformers(tiny_llama, length_penalty):
    """The end token is one that the plain search uses, so that some beams end early."""
    asked = kit.prompts(4, seed=2)
    ends = [reference(tiny_llama, prompt, 4)[3] for prompt in asked]
    expected = [reference(tiny_llama, p, 4, length_penalty, end) for p, end in zip(asked, ends, strict=True)]
    requests = [
        wanted(str(i), p, 4, length_penalty=length_penalty, ignore_eos=False, stop_token_ids=(end,))
        for i, (p, end) in enumerate(zip(asked, ends, strict=True))
    ]
    answers, _ = searched(tiny_llama, requests, num_slots=16)
    assert answers == expected
    assert any(len(answer) < NUM_NEW for answer in answers) or length_penalty > 1, "a high one favours long answers"


@BACKENDS
def test_fewer_slots_and_blocks_than_beams_change_no_answer(tiny_llama, backend):
    """Eight blocks for ten beams of up to three: beams wait for each other, give way and are computed anew."""
    asked = [tuple(range(20 + i, 70 + i)) for i in range(2)]
    expected = [reference(tiny_llama, prompt, 5) for prompt in asked]
    requests = [wanted(str(i), prompt, 5) for i, prompt in enumerate(asked)]
    answers, stats = searched(tiny_llama, requests, backend=backend, num_slots=4, num_blocks=8, prefill_chunk=16)
    assert answers == expected
    assert stats.num_free_blocks == 8


def test_plain_streams_beside_a_search_keep_their_tokens(tiny_llama):
    asked = kit.prompts(5, seed=3)
    expected = [reference(tiny_llama, prompt, 1 + 3 * (i % 2)) for i, prompt in enumerate(asked)]
    answers, _ = searched(tiny_llama, [wanted(str(i), p, 1 + 3 * (i % 2)) for i, p in enumerate(asked)], num_slots=6)
    assert answers == expected


def test_the_logprobs_are_those_of_the_answer(tiny_llama):
    prompt = tuple(range(20, 40))

    async def scenario():
        async with kit.running(softened(tiny_llama), num_slots=4) as engine:
            return await kit.collect(engine, wanted("a", prompt, 3, num_logprobs=2))

    (chunk,) = asyncio.run(scenario())
    ids = torch.tensor([[*prompt, *chunk.token_ids]])
    with torch.inference_mode():
        logprobs = _softened(tiny_llama)(ids).logits[0].log_softmax(-1)
    right = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(chunk.token_ids)]
    assert [entry.token for entry in chunk.logprobs] == list(chunk.token_ids)
    assert [entry.logprob for entry in chunk.logprobs] == pytest.approx(right, abs=1e-3)
    assert all(len(entry.top) == 2 for entry in chunk.logprobs)
    assert (chunk.finish_reason, chunk.num_prompt_tokens) == ("length", 20)


def test_a_mask_holds_for_every_beam(tiny_llama):
    only = [30, 31, 32]
    answers, _ = searched(tiny_llama, [wanted("a", (5, 6), 3, mask=lambda drawn: only if len(drawn) % 2 else [40, 41])], num_slots=4)
    assert all(token in (only if place % 2 else [40, 41]) for place, token in enumerate(answers[0]))


@pytest.mark.parametrize("way", ["abort", "close"])
def test_a_search_that_is_left_frees_every_stream(tiny_llama, way):
    async def scenario():
        async with kit.running(softened(tiny_llama), num_slots=4) as engine:
            task = asyncio.create_task(kit.collect(engine, wanted("a", (5, 6), 4, max_tokens=400)))
            await kit.until(lambda: engine.stats().num_running == 4)
            if way == "abort":
                await engine.abort("a")
                assert (await task)[-1].finish_reason == "abort"
            else:
                task.cancel()
            await kit.until(lambda: engine.stats().num_free_slots == 4)
            return engine.stats()

    stats = asyncio.run(scenario())
    assert stats.num_free_blocks == stats.num_blocks


def test_a_busy_engine_searches_fewer_beams_if_told_to(tiny_llama):
    prompt = kit.prompts(1, seed=5)[0]

    async def scenario():
        async with kit.running(softened(tiny_llama), num_slots=5, busy_beams=2) as engine:
            idle = await kit.tokens(engine, wanted("idle", prompt, 5))
            await kit.until(lambda: engine.stats().num_free_slots == 5)
            async with aclosing(engine.generate(kit.wanted("other", (5,), max_tokens=400))) as other:
                await anext(other)
                return idle, await kit.tokens(engine, wanted("busy", prompt, 5))

    assert asyncio.run(scenario()) == (reference(tiny_llama, prompt, 5), reference(tiny_llama, prompt, 2))


def test_a_search_needs_room_for_all_its_beams_in_the_queue(tiny_llama):
    async def scenario():
        async with kit.running(softened(tiny_llama), num_slots=2, max_waiting=1) as engine:
            with pytest.raises(QueueFull):
                await kit.tokens(engine, wanted("a", (5,), 4))
            return await kit.tokens(engine, wanted("b", (5,), 3))

    assert len(asyncio.run(scenario())) == NUM_NEW


def test_the_death_of_the_engine_ends_a_search(tiny_llama):
    model = kit.lively(tiny_llama)

    async def scenario():
        async with kit.running(model, num_slots=4) as engine:
            task = asyncio.create_task(kit.collect(engine, wanted("a", (5,), 3, max_tokens=400)))
            await kit.until(lambda: engine.stats().num_running == 3)
            model.forward = None
            with pytest.raises(EngineStopped):
                await task

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.5}, "temperature=0"),
        ({"sampling": {"presence_penalty": 1.0}}, "no penalties"),
        ({"prompt_logprobs": True}, "no prompt_logprobs"),
        ({"num_beams": 65}, "1 to 64"),
        ({"num_beams": 0}, "1 to 64"),
    ],
)
def test_what_a_search_has_no_meaning_for_is_refused(tiny_llama, settings, says):
    request = wanted("a", (5,), **{"num_beams": 3, **settings})
    with pytest.raises(InvalidRequest, match=says):
        searched(tiny_llama, [request])


def test_an_engine_without_beam_search_says_so():
    engine = FakeEngine(EngineConfig(type="fake"), context_length=100)

    async def scenario():
        await engine.start()
        await kit.collect(engine, wanted("a", (5,), 2))

    assert "beam_search" not in engine.capabilities
    with pytest.raises(InvalidRequest, match="searches none"):
        asyncio.run(scenario())


def test_a_finished_answer_wins_when_no_running_one_can_pass_it():
    ranking = Ranking(num_beams=2, length_penalty=1.0, max_tokens=9, stop_ids=(1,), vocab_size=50)
    found = [Candidate(parent=0, tokens=(1,), score=-0.1), Candidate(parent=0, tokens=(7,), score=-0.5)]
    assert [each.tokens for each in ranking.step(found)] == [(7,)]
    found = [Candidate(parent=0, tokens=(7, 1), score=-0.6), Candidate(parent=0, tokens=(7, 8), score=-4.0)]
    assert ranking.step(found) == []
    assert ranking.winner().tokens == (1,)
