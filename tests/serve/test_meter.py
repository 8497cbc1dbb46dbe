"""Every generation is counted once, whatever its end."""

from __future__ import annotations

import asyncio
import json
import logging

from hypothesis import given
from hypothesis import strategies as st

from r1ray.serve.meter import LogSink, Meter
from r1ray.serve.protocol import Delta, Done, Fault

DONE = Done(finish_reason="stop", num_prompt_tokens=7, num_completion_tokens=9, num_reasoning_tokens=2, num_cached_tokens=1, ref="m@1")
FAULT = Fault(status=503, code="replica_lost", type="server_error", message="lost")


async def play(events, num_read: int | None, sink) -> None:
    async def source():
        for event in events:
            yield event

    watched = Meter([sink]).watch(source(), request_id="r", model="m")
    num_seen = 0
    async for _ in watched:
        num_seen += 1
        if num_seen == num_read:
            break
    await watched.aclose()


@given(st.lists(st.integers(1, 3), max_size=6), st.sampled_from([DONE, FAULT, None]), st.one_of(st.none(), st.integers(1, 8)))
def test_one_record_per_stream_with_the_tokens_that_were_seen(sizes, end, num_read) -> None:
    records = []

    class Sink:
        def record(self, generation):
            records.append(generation)

    events = [Delta(content="x" * size, num_tokens=size, num_prompt_tokens=7) for size in sizes] + ([end] if end else [])
    asyncio.run(play(events, num_read, Sink()))
    (record,) = records
    seen = events[:num_read]
    if end in seen:
        assert record.outcome == ("stop" if end is DONE else "replica_lost")
    else:
        assert record.outcome == "aborted"
    assert record.num_completion_tokens == (9 if DONE in seen else sum(e.num_tokens for e in seen if isinstance(e, Delta)))
    assert (record.ttft_s is None) == (not sizes)


def test_time_per_token_leaves_out_the_first(caplog) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(play([Delta(num_tokens=1, num_prompt_tokens=7), DONE], None, LogSink(logging.getLogger("test.meter"))))
    record = json.loads(caplog.records[-1].getMessage().removeprefix("generation "))
    assert (record["num_prompt_tokens"], record["num_completion_tokens"], record["outcome"]) == (7, 9, "stop")
