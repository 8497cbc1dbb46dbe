from __future__ import annotations

from dataclasses import replace

import pytest

from r1ray.data.config import DataConfig
from r1ray.data.records import Loaded
from r1ray.errors import NothingToTrain, TooManyBadRows
from r1ray.model.importer import import_model
from r1ray.model.load import training_tokenizer
from r1ray.train.tokens import fit, tokenise
from r1ray.types import Conversation, Message


def dialogue(*texts: str, name: str = "a", reasoning: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    turns = tuple(
        Message(role=roles[i % 2], content=text, reasoning=reasoning if i % 2 else None)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    )
    return Conversation(id=name, messages=turns, source=f"file:{name}")


def loaded(*conversations: Conversation) -> Loaded:
    return Loaded(conversations=conversations, rejects=(), data_hash="d", formats=("messages",), num_rows=len(conversations))


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


DATA = DataConfig(path="x", system_prompt="Help.")


def test_only_the_assistants_words_carry_loss_and_its_end_of_turn(base, tmp_path) -> None:
    tokens = tokenise(loaded(dialogue("question", "answer one", "more", "answer two")), base, DATA, max_length=256, cache=tmp_path)
    (ids,), (mask,) = tokens.rows()
    text = training_tokenizer(base).decode([token for token, trained in zip(ids, mask, strict=True) if trained])
    assert text.replace("\n", "") == "answer one<|im_end|>answer two<|im_end|>"
    assert tokens.num_trained_tokens == sum(mask)


def test_reasoning_reaches_the_loss(tiny_deepseek_v3, registry, tmp_path) -> None:
    base = import_model(str(tiny_deepseek_v3), name="tiny-r1", registry=registry)
    tokens = tokenise(loaded(dialogue("1+1?", "2", reasoning="one and one")), base, DATA, max_length=256, cache=tmp_path)
    (ids,), (mask,) = tokens.rows()
    text = training_tokenizer(base).decode([token for token, trained in zip(ids, mask, strict=True) if trained])
    assert "one and one" in text and "</think>" in text


def test_a_second_call_reads_the_cache_and_another_limit_does_not(base, tmp_path) -> None:
    rows = loaded(dialogue("question", "answer"))
    first = tokenise(rows, base, DATA, max_length=256, cache=tmp_path)
    stamp = first.path.stat().st_mtime_ns
    assert tokenise(rows, base, DATA, max_length=256, cache=tmp_path) == first
    assert first.path.stat().st_mtime_ns == stamp
    assert tokenise(rows, base, DATA, max_length=200, cache=tmp_path).path != first.path
    assert tokenise(rows, base, DATA.model_copy(update={"system_prompt": None}), max_length=256, cache=tmp_path).path != first.path


def test_a_long_dialogue_ends_with_a_whole_assistant_turn() -> None:
    ids, mask = list(range(12)), [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    assert fit(ids, mask, 12) == 12
    assert fit(ids, mask, 11) == 9
    assert fit(ids, mask, 8) == 4
    assert fit(ids, mask, 3) == 0


def test_dialogues_without_a_turn_that_fits_count_as_bad_rows(base, tmp_path) -> None:
    short, long = dialogue("a", "b", name="s"), dialogue("a", "b " * 400, name="l")
    with pytest.raises(TooManyBadRows, match=r"train\.max_length=100"):
        tokenise(loaded(short, long), base, DATA, max_length=100, cache=tmp_path)
    lenient = DATA.model_copy(update={"max_bad_share": 0.5})
    assert tokenise(loaded(short, long), base, lenient, max_length=100, cache=tmp_path).num_rejected == 1


def test_a_set_without_any_answer_has_nothing_to_train(base, tmp_path) -> None:
    with pytest.raises((NothingToTrain, TooManyBadRows)):
        tokenise(loaded(dialogue("only a question")), base, DATA, max_length=100, cache=tmp_path)
    with pytest.raises(NothingToTrain):
        lenient = DATA.model_copy(update={"max_bad_share": 1.0})
        tokenise(loaded(dialogue("only a question")), base, lenient, max_length=100, cache=tmp_path)


def test_of_a_sample_the_sample_counts_and_not_the_file(base, tmp_path) -> None:
    """A hundred rows were read and two are used, one of which does not fit."""
    few = replace(loaded(dialogue("short", "answer"), dialogue("long " * 200, "answer")), num_rows=100)
    with pytest.raises(TooManyBadRows, match=r"1 of 2 dialogues .* train\.max_length=100"):
        tokenise(few, base, DATA, max_length=100, cache=tmp_path)


def test_a_set_of_which_nothing_fits_says_so(base, tmp_path) -> None:
    lenient = DATA.model_copy(update={"max_bad_share": 1.0})
    with pytest.raises(NothingToTrain, match=r"ends within train\.max_length=16 tokens\. Raise it"):
        tokenise(loaded(dialogue("long " * 200, "answer")), base, lenient, max_length=16, cache=tmp_path)
