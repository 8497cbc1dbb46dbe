"""Scores and text: every token's score goes out once, in order, with the text that the token begins."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.protocol import TokenChunk, TokenLogprobs
from r1ray.model import template
from r1ray.serve.codec import TokenizerCodec
from r1ray.serve.config import ModelArgs
from r1ray.serve.host import ModelHost, warmed
from r1ray.serve.protocol import Delta, TextRequest
from r1ray.serve.scored import ScoredAssembler, echoed

SIZES = st.lists(st.integers(1, 5), max_size=40)
STOPS = st.lists(st.text("abS\n", min_size=1, max_size=4), max_size=3)


class Bytes:
    """A codec of one token per byte; tokens above them spell what `words` says and have no text, as special tokens."""

    def __init__(self, words: tuple[bytes, ...] = ()) -> None:
        self.words = words

    def decode(self, token_ids):
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def piece(self, token_id: int):
        return bytes([token_id]) if token_id < 256 else self.words[token_id - 256]


def entries(tokens) -> list[TokenLogprobs]:
    return [TokenLogprobs(token=token, logprob=-1.0, top=((token, -1.0),)) for token in tokens]


def assemble(tokens, sizes=(), *, stops=(), prefilled=None, codec=None) -> tuple[ScoredAssembler, list[Delta]]:
    """Fed in chunks of `sizes`, as they come from an engine; the rest one by one."""
    machine, deltas, at = ScoredAssembler(codec or Bytes(), stops, prefilled=prefilled), [], 0
    for size in [*sizes, *[1] * len(tokens)]:
        if at < len(tokens) and not machine.stopped:
            part = tokens[at : at + size]
            deltas.append(machine.feed_scored(part, entries(part)))
            at += size
    if not machine.stopped:
        deltas.append(machine.flush())
    return machine, deltas


@given(st.text("ab你é😀S\n", max_size=40), SIZES, STOPS)
def test_a_raw_answers_scores_come_with_the_text_that_their_tokens_begin(text: str, sizes, stops) -> None:
    data = text.encode()
    machine, deltas = assemble(data, sizes, stops=stops)
    scores = [score for delta in deltas for score in delta.scores]
    assert b"".join(score.piece for score in scores) == data[: machine.num_tokens]
    shown = 0
    for delta in deltas:
        end = shown + len(delta.content)
        if delta is not deltas[-1]:
            assert all(shown <= score.offset < end for score in delta.scores)
            assert not delta.content or delta.scores
        shown = end
    starts = [at for at, character in enumerate(text) for _ in character.encode()]
    assert [score.offset for score in scores] == starts[: machine.num_tokens]
    assert all(delta.num_reasoning_scores == 0 for delta in deltas)


@given(st.text("a你 \n<", max_size=12), st.text("b好 \n", max_size=12), SIZES, st.sampled_from(["</think>", "</think>\n\n", ""]))
@pytest.mark.parametrize("prefilled", [True, False])
def test_scores_of_the_reasoning_are_counted_to_the_token(prefilled: bool, thought: str, answer: str, sizes, close: str) -> None:
    data = (("" if prefilled else "<think>") + thought + close + answer).encode()
    machine, deltas = assemble(data, sizes, prefilled=prefilled)
    assert b"".join(score.piece for delta in deltas for score in delta.scores) == data
    assert sum(delta.num_reasoning_scores for delta in deltas) == machine.num_reasoning_tokens
    first = [delta.num_reasoning_scores < len(delta.scores) for delta in deltas if delta.scores]
    assert first == sorted(first)  # those of the reasoning come first
    assert all(delta.scores or not (delta.reasoning or delta.content) for delta in deltas)


def test_a_stop_texts_own_tokens_are_scored_and_what_comes_after_it_is_not() -> None:
    machine, deltas = assemble(b"one.STOPtwo", (2, 7), stops=("STOP",))
    assert "".join(delta.content for delta in deltas) == "one."
    assert b"".join(score.piece for delta in deltas for score in delta.scores) == b"one.STOP"
    assert machine.num_tokens == 8


def test_what_may_become_a_stop_text_holds_its_scores_back() -> None:
    _, deltas = assemble(b"aSTb", stops=("STOP",))
    assert [(delta.content, b"".join(score.piece for score in delta.scores)) for delta in deltas] == [
        ("a", b"a"),
        ("", b""),
        ("", b""),
        ("STb", b"STb"),
        ("", b""),
    ]


def test_tokens_without_text_go_with_the_next_that_has_some_or_with_the_end() -> None:
    _, deltas = assemble([256, *b"ab", 257], codec=Bytes((b"<bos>", b"<eos>")))
    assert [[score.piece for score in delta.scores] for delta in deltas] == [[], [b"<bos>", b"a"], [b"b"], [], [b"<eos>"]]


def test_every_token_needs_its_entry() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ScoredAssembler(Bytes(), (), prefilled=None).feed_scored(b"ab", entries(b"a"))


@pytest.mark.parametrize(
    ("text", "pieces", "offsets"),
    [
        ("a你b", [b"a", "你".encode()[:1], "你".encode()[1:], b"b"], [0, 1, 1, 2]),
        ("ab", [b"<s>", b"a", b"b"], [0, 0, 1]),
        ("one two", [b" one", b" two"], [0, 3]),
        ("x你", [b"x\xe4", b"\xbd\xa0"], [0, 1]),
        ("", [b"<s>"], [0]),
    ],
)
def test_an_echoed_prompt_says_where_each_token_begins(text: str, pieces, offsets) -> None:
    first = TokenChunk(
        request_id="r", token_ids=(), finish_reason=None, num_prompt_tokens=len(pieces), prompt_logprobs=(-0.5,) * (len(pieces) - 1)
    )
    delta = echoed(Bytes(tuple(pieces)), text, range(256, 256 + len(pieces)), first, scored=True)
    assert (delta.content, delta.num_prompt_tokens, delta.num_tokens) == (text, len(pieces), 0)
    assert [score.offset for score in delta.scores] == offsets
    assert [score.logprob for score in delta.scores] == [None] + [-0.5] * (len(pieces) - 1)
    assert echoed(Bytes(), text, (), first, scored=False).scores == ()


def test_a_real_engines_scores_are_those_of_one_forward_pass(tiny_llama, fakes, tmp_path) -> None:
    """From text to text through tokenizer, engine and host: a scored prompt and an answer of whatever a random model draws."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    info = template.write(template.pair_for(tokenizer.chat_template), shutil.copytree(tiny_llama, tmp_path / "model"))
    made = fakes.make_artifact()
    artifact = replace(made, path=tmp_path / "model", manifest=made.manifest.model_copy(update={"template": info, "context_length": 512}))
    config = EngineConfig(backend="transformers", dtype="float32", num_threads=1, num_slots=2)

    async def load(artifact):
        return await warmed(artifact, TokenizerCodec(artifact), create_engine(artifact, config, registry=None))

    async def run():
        host = ModelHost(ModelArgs(id="m", ref="m@1"), lambda: artifact, load)
        await host.start()
        try:
            wanted = {"num_logprobs": 3, "echo": True, "overrides": {"temperature": 1.0, "top_p": 1.0, "seed": 5, "max_tokens": 40}}
            return [event async for event in host.stream(TextRequest(id="r", prompt="丢 card", ignore_eos=True, **wanted))]
        finally:
            await host.stop()

    *deltas, done = asyncio.run(run())
    scores = [score for delta in deltas for score in delta.scores]
    text, num_prompt = "".join(delta.content for delta in deltas), done.num_prompt_tokens
    assert (len(scores) - num_prompt, done.num_completion_tokens) == (40, 40)
    codec = TokenizerCodec(artifact)
    id_of = {codec.piece(token): token for token in reversed(range(640))}
    ids = [id_of[score.piece] for score in scores]
    assert ids[:num_prompt] == tokenizer.encode("丢 card") and text == "丢 card" + codec.decode(ids[num_prompt:])
    assert [score.offset for score in scores] == sorted(score.offset for score in scores)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert scores[0].logprob is None
    assert [score.logprob for score in scores[1:]] == pytest.approx(
        [float(logprobs[at, token]) for at, token in enumerate(ids[1:])], abs=1e-3
    )
    likeliest = [value for score in scores[1:] for _, value in score.top]
    assert likeliest == pytest.approx(logprobs[:-1].topk(3).values.flatten().tolist(), abs=1e-3)
