"""Whatever joins or leaves the batch, every stream gets what it would have got alone."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from r1ray.errors import DeadlineExceeded, EngineStopped, GenerationFailed, InvalidRequest, PromptTooLong, QueueFull, UnknownAdapter
from tests.engine import conftest as kit

collect, lively, prompts, running, tokens, until, wanted = (
    kit.collect, kit.lively, kit.prompts, kit.running, kit.tokens, kit.until, kit.wanted,
)  # fmt: skip


BACKENDS = pytest.mark.parametrize("backend", ["transformers", kit.native(), "onnx"])
WITH_ADAPTERS = pytest.mark.parametrize("backend", ["transformers", kit.native()])


@pytest.mark.parametrize("schedule", range(3))
def test_greedy_tokens_equal_transformers_generate_in_any_company(placed, reference, schedule):
    family, backend = placed
    rng = random.Random(schedule)
    asked = prompts(8)
    lengths = [rng.randint(1, 12) for _ in asked]
    expected = [reference(family, p, 12)[:n] for p, n in zip(asked, lengths, strict=True)]
    leaves_early = {rng.randrange(len(asked)) for _ in range(3)}

    async def one(engine, i):
        await asyncio.sleep(rng.random() * 0.03)
        got = []
        async with aclosing(engine.generate(wanted(str(i), asked[i], max_tokens=lengths[i]))) as chunks:
            async for chunk in chunks:
                got += chunk.token_ids
                if i in leaves_early and len(got) > lengths[i] // 2:
                    break
        return got

    async def scenario():
        async with running(lively(family), backend=backend, num_slots=1 + schedule * 2, prefill_chunk=rng.choice([1, 7, 64])) as engine:
            return await asyncio.gather(*(one(engine, i) for i in range(len(asked))))

    for i, (got, right) in enumerate(zip(asyncio.run(scenario()), expected, strict=True)):
        assert got == (right[: len(got)] if i in leaves_early else right), f"stream {i}"


def all_have_come(engine, num=3):
    while engine._register.num_open < num:
        time.sleep(0.0005)


@BACKENDS
def test_streams_that_outgrow_the_cache_take_turns_and_keep_their_tokens(tiny_qwen2, reference, backend):
    """Five blocks of 32 positions for three streams that need three each: some are preempted and computed anew."""
    asked = [tuple(range(20 + i, 60 + i)) for i in range(3)]
    expected = [reference(tiny_qwen2, prompt, 50) for prompt in asked]

    async def scenario():
        async with running(lively(tiny_qwen2), backend=backend, num_slots=3, prefill_chunk=50, num_blocks=5) as engine:
            engine._inbox.put(lambda: all_have_come(engine))  # a fast engine would be done with the first before the last comes
            wants = [tokens(engine, wanted(str(i), prompt, max_tokens=50)) for i, prompt in enumerate(asked)]
            return await asyncio.gather(*wants), engine.stats()

    got, stats = asyncio.run(scenario())
    assert got == expected
    assert stats.num_preempted > 0
    assert stats.num_free_blocks == 5


@BACKENDS
def test_a_shared_beginning_is_computed_once_and_changes_no_token(tiny_llama, reference, backend):
    shared = tuple(range(20, 120))
    first, second = (*shared, 5, 6), (*shared, 7, 8, 9)
    expected = [reference(tiny_llama, prompt, 12) for prompt in (first, second, second)]

    async def scenario():
        async with running(lively(tiny_llama), backend=backend, num_slots=2) as engine:
            chunks = [await collect(engine, wanted("a", first))]
            chunks.append(await collect(engine, wanted("b", second)))
            chunks.append(await collect(engine, wanted("c", second, cache_salt="another tenant")))
            return chunks, engine.stats()

    answers, stats = asyncio.run(scenario())
    assert [[t for chunk in answer for t in chunk.token_ids] for answer in answers] == expected
    assert [answer[-1].num_cached_tokens for answer in answers] == [0, 96, 0]
    assert stats.num_cached_tokens == 96


def test_a_bias_a_mask_and_logprobs_act_on_their_request_only(tiny_llama, reference):
    prompt = (5, 6, 7)
    plain = reference(tiny_llama, prompt, 12)

    async def scenario():
        async with running(lively(tiny_llama), num_slots=4) as engine:
            return await asyncio.gather(
                collect(engine, wanted("plain", prompt, num_logprobs=3)),
                collect(engine, wanted("biased", prompt, logit_bias=((77, 1e4),))),
                collect(engine, wanted("masked", prompt, mask=lambda drawn: [30 + len(drawn)])),
            )

    answers = asyncio.run(scenario())
    ids = [[t for chunk in answer for t in chunk.token_ids] for answer in answers]
    assert ids == [plain, [77] * 12, list(range(30, 42))]
    logprobs = [chunk.logprobs[0] for chunk in answers[0]]
    assert [entry.token for entry in logprobs] == plain
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 3 for entry in logprobs)
    assert all(math.fsum(math.exp(value) for _, value in entry.top) <= 1 + 1e-9 for entry in logprobs)


def test_two_streams_progress_together(tiny_llama):
    order = []

    async def one(engine, name):
        async with aclosing(engine.generate(wanted(name, (5, 6, 7), max_tokens=30))) as chunks:
            async for _ in chunks:
                order.append(name)

    async def scenario():
        async with running(lively(tiny_llama), num_slots=2) as engine:
            await asyncio.gather(one(engine, "a"), one(engine, "b"))

    asyncio.run(scenario())
    assert "b" in order[: order.index("a") + 20]
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")


def test_a_long_prompt_does_not_stop_the_running_streams(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=2, prefill_chunk=10) as engine:
            chunks = engine.generate(wanted("a", (5,), max_tokens=400))
            await anext(chunks)
            before = engine.stats()
            await tokens(engine, wanted("long", tuple(range(20, 420)), max_tokens=1))
            after = engine.stats()
            await chunks.aclose()
        return after.num_generated_tokens - before.num_generated_tokens

    assert asyncio.run(scenario()) >= 30  # 400 prompt tokens took 40 steps, each with a token for the other


@pytest.mark.parametrize("way", ["abort", "close", "cancel", "forget"])
def test_a_client_that_leaves_frees_its_slot(tiny_llama, way):
    async def consume(engine):
        return [chunk async for chunk in engine.generate(wanted("a", (5, 6), max_tokens=500))]

    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            if way in ("abort", "cancel"):
                task = asyncio.create_task(consume(engine))
                await until(lambda: engine.stats().num_running == 1)
                if way == "abort":
                    await engine.abort("a")
                    assert (await task)[-1].finish_reason == "abort"
                else:
                    task.cancel()
            else:
                chunks = engine.generate(wanted("a", (5, 6), max_tokens=500))
                await anext(chunks)
                if way == "close":
                    await chunks.aclose()
                del chunks
                gc.collect()
            await until(lambda: engine.stats().num_free_slots == 1)
            return engine.stats()

    stats = asyncio.run(scenario())
    assert stats.num_aborted == 1
    assert stats.num_generated_tokens < 500


def test_an_abort_takes_effect_before_the_next_step(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            chunks = engine.generate(wanted("a", (5, 6), max_tokens=500))
            await anext(chunks)
            await engine.abort("a")
            at = engine.stats().num_steps
            await until(lambda: engine.stats().num_free_slots == 1)
            return engine.stats().num_steps - at

    assert asyncio.run(scenario()) <= 1


def test_a_waiting_request_can_be_aborted(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            first = engine.generate(wanted("a", (5,), max_tokens=500))
            await anext(first)
            second = asyncio.create_task(collect(engine, wanted("b", (6,))))
            await until(lambda: engine.stats().num_waiting == 1)
            await engine.abort("b")
            return (await second)[-1]

    last = asyncio.run(scenario())
    assert (last.finish_reason, last.token_ids) == ("abort", ())


def test_a_more_urgent_request_starts_first(tiny_llama):
    finished = []

    async def one(engine, name, priority):
        await collect(engine, wanted(name, (5,), max_tokens=3, priority=priority))
        finished.append(name)

    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            blocker = asyncio.create_task(collect(engine, wanted("first", (5,), max_tokens=100)))
            await until(lambda: engine.stats().num_running == 1)
            await asyncio.gather(one(engine, "late", 5), one(engine, "urgent", -1), one(engine, "normal", 0), blocker)

    asyncio.run(scenario())
    assert finished == ["urgent", "normal", "late"]


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (wanted("a", ()), InvalidRequest, "empty prompt"),
        (wanted("a", (3, 9999)), InvalidRequest, "9999"),
        (wanted("a", tuple(range(20, 60))), PromptTooLong, "40 tokens leaves no room in the context of 40"),
        (wanted("a", (5,), adapter="x"), UnknownAdapter, "'x'"),
        (wanted("a", (5,), logit_bias=((640, 1.0),)), InvalidRequest, "logit_bias for token id 640"),
        (wanted("a", (5,), num_logprobs=9999), InvalidRequest, "9999 logprobs"),
        (wanted("a", (5,), prompt_logprobs=True, num_prompt_logprobs=-1), InvalidRequest, "-1 logprobs"),
        (wanted("a", (5,), stop_token_ids=(7, 640)), InvalidRequest, "stops at token id 640"),
    ],
)
def test_a_request_that_cannot_run_is_refused(tiny_llama, request_, error, says):
    async def scenario():
        async with running(lively(tiny_llama), max_context=40) as engine:
            await collect(engine, request_)

    with pytest.raises(error, match=says):
        asyncio.run(scenario())


def test_a_full_queue_refuses_and_recovers(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=1, max_waiting=1) as engine:
            asked = [collect(engine, wanted(str(i), (5,), max_tokens=40)) for i in range(4)]
            results = await asyncio.gather(*asked, return_exceptions=True)
            return [type(r) for r in results], await tokens(engine, wanted("again", (5,), max_tokens=2))

    kinds, again = asyncio.run(scenario())
    assert kinds == [list, list, QueueFull, QueueFull]
    assert len(again) == 2


def test_max_tokens_is_clipped_to_the_context(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), max_context=20) as engine:
            return await collect(engine, wanted("a", (5,) * 15, max_tokens=100))

    chunks = asyncio.run(scenario())
    assert sum(len(c.token_ids) for c in chunks) == 5
    assert chunks[-1].finish_reason == "length"


def test_end_of_text_stops_unless_ignored_or_too_early(tiny_llama, reference):
    answer = reference(tiny_llama, (5, 6, 7), 12)
    end = answer[3]
    first = answer.index(end)

    async def scenario():
        async with running(lively(tiny_llama), eos=(end,)) as engine:
            stopped = await collect(engine, wanted("a", (5, 6, 7), ignore_eos=False))
            ignored = await tokens(engine, wanted("b", (5, 6, 7)))
            longer = await tokens(engine, wanted("c", (5, 6, 7), ignore_eos=False, min_tokens=10))
        return stopped, ignored, longer

    stopped, ignored, longer = asyncio.run(scenario())
    assert [t for c in stopped for t in c.token_ids] == answer[:first]
    assert (stopped[-1].finish_reason, stopped[-1].num_prompt_tokens) == ("stop", 3)
    assert ignored == answer
    assert len(longer) >= 10
    assert end not in longer[:10]


def test_a_request_has_stop_tokens_of_its_own(tiny_llama, reference):
    answer = reference(tiny_llama, (5, 6, 7), 12)

    async def scenario():
        async with running(lively(tiny_llama)) as engine:
            return await collect(engine, wanted("a", (5, 6, 7), ignore_eos=False, stop_token_ids=(answer[2],)))

    assert [t for c in asyncio.run(scenario()) for t in c.token_ids] == answer[: answer.index(answer[2])]


def test_the_stop_token_comes_with_its_logprob_to_those_who_keep_it(tiny_llama, reference):
    answer = reference(tiny_llama, (5, 6, 7), 12)
    first = answer.index(answer[3])

    async def scenario():
        async with running(lively(tiny_llama), eos=(answer[3],)) as engine:
            return await collect(engine, wanted("a", (5, 6, 7), ignore_eos=False, keep_stop=True, num_logprobs=0))

    chunks = asyncio.run(scenario())
    assert [t for c in chunks for t in c.token_ids] == answer[: first + 1]
    assert [entry.token for c in chunks for entry in c.logprobs] == answer[: first + 1]
    assert chunks[-1].finish_reason == "stop"


@BACKENDS
def test_a_seed_gives_the_same_tokens_alone_and_in_company(tiny_qwen2, backend):
    settings = {"seed": 7, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    mine = wanted("mine", (5, 6, 7), temperature=1.0, sampling=settings, max_tokens=20)

    async def scenario():
        async with running(lively(tiny_qwen2), num_slots=5, backend=backend) as engine:
            alone = await tokens(engine, mine)
            others = [tokens(engine, wanted(str(i), p, temperature=0.7)) for i, p in enumerate(prompts(6))]
            crowded, *_ = await asyncio.gather(tokens(engine, mine), *others)
            other_seed = await tokens(engine, wanted("x", (5, 6, 7), temperature=1.0, sampling={**settings, "seed": 8}, max_tokens=20))
        return alone, crowded, other_seed

    alone, crowded, other_seed = asyncio.run(scenario())
    assert alone == crowded
    assert alone != other_seed


@BACKENDS
def test_broken_logits_fail_one_request_only(tiny_llama, reference, backend):
    good = (5, 6, 7)
    expected = reference(tiny_llama, good, 12)
    model = lively(tiny_llama)
    model.model.embed_tokens.weight.data[499] = float("nan")

    async def scenario():
        async with running(model, num_slots=2, backend=backend) as engine:
            results = await asyncio.gather(
                tokens(engine, wanted("bad", (499, 5))), tokens(engine, wanted("good", good)), return_exceptions=True
            )
            return results, await tokens(engine, wanted("next", good)), engine.stats()

    (bad, beside), after, stats = asyncio.run(scenario())
    assert isinstance(bad, GenerationFailed)
    assert beside == expected
    assert after == expected, "the slot is clean again"
    assert stats.num_failed == 1


def test_end_of_text_beyond_the_vocabulary_is_left_out_with_a_warning(tiny_llama, reference, caplog):
    """A tokenizer may have added tokens that the model has no row for: no step may index by them."""
    plain = reference(tiny_llama, (5, 6, 7), 4)
    end = plain[0]

    async def scenario():
        async with running(lively(tiny_llama), eos=(end, 640, 99_999)) as engine:
            held = await tokens(engine, wanted("a", (5, 6, 7), ignore_eos=False, min_tokens=2, max_tokens=4))
            return held, await tokens(engine, wanted("b", (5, 6, 7), max_tokens=4)), engine.stats().state

    held, after, state = asyncio.run(scenario())
    assert end not in held[:2]
    assert (after, state) == (plain, "running")
    assert "[640, 99999] are beyond the vocabulary of 640" in caplog.text


@BACKENDS
@pytest.mark.parametrize("kind", ["damaged", "masked"])
def test_a_failed_request_spoils_nobody_who_shares_its_beginning(tiny_llama, reference, backend, kind):
    """A long system prompt: its blocks are the other streams' too, and must neither be overwritten nor, after a mask, be forgotten."""
    system = tuple(range(20, 120))
    good, later = (*system, 5, 6), (*system, 7)
    expected = [reference(tiny_llama, good, 40), reference(tiny_llama, later, 12)]
    model = lively(tiny_llama)
    model.model.embed_tokens.weight.data[499] = float("nan")
    bad = wanted("bad", (*system, 499)) if kind == "damaged" else wanted("bad", (*system, 8), mask=lambda drawn: [])

    async def scenario():
        async with running(model, num_slots=3, backend=backend) as engine:
            chunks = engine.generate(wanted("good", good, max_tokens=40))
            got = list((await anext(chunks)).token_ids)
            with pytest.raises(GenerationFailed):
                await tokens(engine, bad)
            async for chunk in chunks:
                got += chunk.token_ids
            after = await collect(engine, wanted("later", later))
            return got, [token for chunk in after for token in chunk.token_ids], after[-1].num_cached_tokens, engine.stats()

    got, after, num_cached, stats = asyncio.run(scenario())
    assert [got, after] == expected
    assert num_cached == (0 if kind == "damaged" else 96)
    assert stats.num_free_blocks == stats.num_blocks


@BACKENDS
def test_what_shares_damaged_blocks_fails_too_and_nobody_after_it(tiny_llama, reference, backend):
    """The damage lies in the common beginning: whoever found it draws nothing finite, and the room is clean for its next owner."""
    system = (499, *range(20, 120))
    model = lively(tiny_llama)
    model.model.embed_tokens.weight.data[499] = float("nan")
    good = tuple(range(30, 140))

    async def scenario():
        async with running(model, num_slots=2, num_blocks=8, prefill_chunk=20, backend=backend) as engine:
            clear, cleared = engine.backend.clear, []
            engine.backend.clear = lambda blocks: (cleared.extend(blocks), clear(blocks))
            engine._inbox.put(lambda: all_have_come(engine, 2))
            asked = [tokens(engine, wanted(name, (*system, last))) for name, last in (("a", 5), ("b", 6))]
            failed = await asyncio.gather(*asked, return_exceptions=True)
            return failed, await tokens(engine, wanted("next", good)), cleared, engine.stats()

    failed, after, cleared, stats = asyncio.run(scenario())
    assert [type(each) for each in failed] == [GenerationFailed] * 2
    assert len(cleared) == len(set(cleared)) == 6, "two shared blocks, two of each stream's own"
    assert after == reference(tiny_llama, good, 12)
    assert stats.num_free_blocks == 8


@pytest.mark.parametrize("mask", [lambda drawn: [], lambda drawn: 1 / 0], ids=["nothing", "failing"])
def test_a_mask_that_allows_nothing_fails_its_own_request(tiny_llama, reference, mask):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=2) as engine:
            asked = [tokens(engine, wanted("masked", (5, 6), mask=mask)), tokens(engine, wanted("beside", (5, 6, 7)))]
            return await asyncio.gather(*asked, return_exceptions=True)

    masked, beside = asyncio.run(scenario())
    assert isinstance(masked, GenerationFailed)
    assert beside == reference(tiny_llama, (5, 6, 7), 12)


def test_death_of_the_engine_reaches_every_consumer(tiny_llama):
    model = lively(tiny_llama)

    async def scenario():
        async with running(model, num_slots=2) as engine:
            tasks = [asyncio.create_task(collect(engine, wanted(str(i), (5,), max_tokens=500))) for i in range(4)]
            await until(lambda: engine.stats().num_generated_tokens > 4)
            model.forward = None  # the next step raises
            results = await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(EngineStopped):
                await collect(engine, wanted("late", (5,)))
            with pytest.raises(EngineStopped):
                await engine.load_adapter("late", Path("nowhere"))
            return results, engine.stats()

    results, stats = asyncio.run(scenario())
    assert [type(r) for r in results] == [EngineStopped] * 4
    assert stats.state == "failed"
    assert "TypeError" in stats.error


def test_stopping_an_engine_gives_its_backend_back_once_started_or_not(tiny_llama):
    async def scenario(starts):
        engine, closed = kit.engine_of(lively(tiny_llama)), []
        engine.backend.close = lambda: closed.append(True)
        if starts:
            await engine.start()
        await engine.stop()
        await engine.stop()
        return len(closed), engine.stats().state

    assert [asyncio.run(scenario(starts)) for starts in (False, True)] == [(1, "stopped")] * 2


def test_a_request_over_its_time_ends_with_an_error_and_frees_its_slot(tiny_llama, reference):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            got = []
            with pytest.raises(DeadlineExceeded, match=r"Request late was not done within its 0\.1 s"):
                async with aclosing(engine.generate(wanted("late", (5, 6), max_tokens=500, timeout_s=0.1))) as chunks:
                    async for chunk in chunks:
                        got += chunk.token_ids
                        time.sleep(0.001)  # the engine's thread goes on
            after = engine.stats()
            return got, after, await tokens(engine, wanted("next", (5, 6, 7), timeout_s=60))

    got, after, following = asyncio.run(scenario())
    assert 0 < len(got) < 500
    assert (after.num_failed, after.num_free_slots) == (1, 1)
    assert following == reference(tiny_llama, (5, 6, 7), 12)


def test_a_waiting_request_is_over_time_in_the_queue(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=1) as engine:
            first = engine.generate(wanted("first", (5,), max_tokens=500))
            await anext(first)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await tokens(engine, wanted("late", (6,), timeout_s=0.05))
            took = time.monotonic() - began
            await first.aclose()
            await until(lambda: engine.stats().num_free_slots == 1)
            return took, engine.stats()

    took, stats = asyncio.run(scenario())
    assert 0.05 <= took < 2
    assert (stats.num_failed, stats.num_waiting) == (1, 0)


def test_a_search_is_over_time_as_a_whole(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=4) as engine:
            with pytest.raises(DeadlineExceeded):
                await collect(engine, wanted("search", (5, 6), max_tokens=400, num_beams=3, timeout_s=0.2))
            await until(lambda: engine.stats().num_free_slots == 4)

    asyncio.run(scenario())


def test_stop_drains_then_ends_the_rest(tiny_llama):
    async def scenario():
        async with running(lively(tiny_llama), num_slots=2) as engine:
            short = asyncio.create_task(tokens(engine, wanted("short", (5,), max_tokens=5)))
            endless = asyncio.create_task(tokens(engine, wanted("endless", (5,), max_tokens=500)))
            await until(lambda: engine.stats().num_generated_tokens >= 1)
            stopping = asyncio.create_task(engine.stop(drain_s=0.05))
            await until(lambda: engine.stats().state != "running")
            with pytest.raises(EngineStopped):
                await tokens(engine, wanted("late", (5,)))
            await stopping
            return await asyncio.gather(short, endless, return_exceptions=True)

    short, endless = asyncio.run(scenario())
    assert len(short) == 5
    assert isinstance(endless, EngineStopped)


def test_an_engine_that_was_not_started_says_so(tiny_llama):
    with pytest.raises(EngineStopped, match="is new"):
        asyncio.run(collect(kit.engine_of(lively(tiny_llama)), wanted("a", (5,))))


@WITH_ADAPTERS
def test_requests_of_different_adapters_run_together(tiny_qwen2, tmp_path, reference, backend):
    paths = {name: kit.adapter(tiny_qwen2, tmp_path / name, seed) for seed, name in enumerate(("one", "two"), start=1)}
    prompt = (5, 6, 7, 8)
    expected = {name: reference(tiny_qwen2, prompt, 12, path) for name, path in paths.items()}
    expected[None] = reference(tiny_qwen2, prompt, 12)

    async def scenario():
        async with running(lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            running_before = asyncio.create_task(tokens(engine, wanted("base", prompt, max_tokens=60)))
            for name, path in paths.items():
                await engine.load_adapter(name, path)
            names = [None, "one", "two", "one", None]
            got = await asyncio.gather(*(tokens(engine, wanted(str(i), prompt, adapter=n)) for i, n in enumerate(names)))
            await engine.load_adapter("one", paths["two"])
            replaced = await tokens(engine, wanted("r", prompt, adapter="one"))
            with pytest.raises(Exception, match="nowhere"):
                await engine.load_adapter("broken", tmp_path / "nowhere")
            return list(zip(names, got, strict=True)), replaced, await running_before

    answers, replaced, before = asyncio.run(scenario())
    assert len({tuple(v) for v in expected.values()}) == 3
    for name, got in answers:
        assert got == expected[name], name
    assert replaced == expected["two"]
    assert before[:12] == expected[None]


@BACKENDS
def test_prompt_logprobs_are_those_of_one_forward_pass(tiny_llama, backend):
    import torch

    prompt, model = tuple(range(20, 110)), lively(tiny_llama)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    values, best = logprobs[:-1].topk(3)

    async def scenario():
        async with running(model, backend=backend, num_slots=3, prefill_chunk=17) as engine:
            await collect(engine, wanted("warms the prefix cache", prompt))
            return await asyncio.gather(
                collect(engine, wanted("scored", prompt, max_tokens=2, prompt_logprobs=True, num_prompt_logprobs=3)),
                collect(engine, wanted("beside", prompt[:40])),
                collect(engine, wanted("one token", (5,), max_tokens=1, prompt_logprobs=True)),
            )

    scored, beside, shortest = asyncio.run(scenario())
    assert list(scored[0].prompt_logprobs) == pytest.approx(expected, abs=1e-3)
    assert [[token for token, _ in top] for top in scored[0].prompt_top] == best.tolist()
    assert [value for top in scored[0].prompt_top for _, value in top] == pytest.approx(values.flatten().tolist(), abs=1e-3)
    assert [(chunk.prompt_logprobs, chunk.prompt_top) for chunk in scored[1:]] == [((), ())]
    assert not any(chunk.prompt_logprobs for chunk in beside)
    assert (shortest[0].prompt_logprobs, shortest[0].prompt_top) == ((), ())


def test_a_latency_objective_holds_streams_back_and_serves_all(tiny_llama):
    """An objective that no step can meet leaves the least number running together; nobody is refused."""

    async def scenario():
        async with running(lively(tiny_llama), num_slots=8, min_slots=2, tpot_objective_ms=0.001) as engine:
            most = 0

            async def one(number):
                nonlocal most
                async with aclosing(engine.generate(wanted(str(number), (5, number + 20), max_tokens=30))) as chunks:
                    async for _ in chunks:
                        most = max(most, engine.stats().num_running)

            await asyncio.gather(*(one(number) for number in range(6)))
            return most, engine.stats()

    most, stats = asyncio.run(scenario())
    assert most == 2
    assert stats.num_finished == 6


def test_a_latency_objective_lets_more_in_where_two_passes_are_under_way(tiny_llama):
    """As in a pipeline: each pass decodes half of the streams, and a stream's tokens are two passes apart."""
    from r1ray.engine.batching import BatchingEngine
    from r1ray.engine.config import EngineConfig
    from r1ray.engine.paged import TransformersBackend

    class TwoAtOnce(TransformersBackend):
        depth = 2

    async def scenario(objective_ms):
        config = EngineConfig(num_threads=1, num_slots=6, min_slots=2, tpot_objective_ms=objective_ms)
        model = lively(tiny_llama)
        engine = BatchingEngine(TwoAtOnce(model, num_blocks=64), config, context_length=512)
        await engine.start()
        asked = [tokens(engine, wanted(str(i), (5, i + 20), max_tokens=60)) for i in range(9)]
        got = await asyncio.gather(*asked)
        limit = engine._core.scheduler.limit
        await engine.stop()
        return limit, {len(each) for each in got}

    assert asyncio.run(scenario(10_000)) == (6, {60})
    assert asyncio.run(scenario(0.001)) == (2, {60})
