from __future__ import annotations

import pytest

from r1ray.data.config import DataConfig
from r1ray.data.preferences import LoadedPairs
from r1ray.errors import NothingToTrain, TooManyBadRows
from r1ray.model.importer import import_model
from r1ray.model.load import training_tokenizer
from r1ray.train.pairs import PairLimits, tokenise_pairs
from r1ray.types import Message, Preference

DATA = DataConfig(path="x", system_prompt="Help.")
LIMITS = PairLimits(max_length=64, eval_share=0.0, eval_limit=400, seed=0)


def pair(prompt: str, chosen: str, rejected: str, *, reasoning: str | None = None) -> Preference:
    answers = [Message(role="assistant", content=text, reasoning=reasoning) for text in (chosen, rejected)]
    return Preference(id=prompt, prompt=(Message(role="user", content=prompt),), chosen=answers[0], rejected=answers[1], source="f:1")


def loaded(*pairs: Preference) -> LoadedPairs:
    return LoadedPairs(pairs=pairs, rejects=(), data_hash="d", formats=("pairs",), num_rows=len(pairs))


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def test_a_pair_is_its_prompt_and_two_answers_with_their_end_of_turn(base, tmp_path) -> None:
    tokens = tokenise_pairs(loaded(pair("question", "better", "worse one")), base, DATA, LIMITS, tmp_path)
    (row,), held_out = tokens.rows()
    decode = training_tokenizer(base).decode
    assert decode(row.prompt).endswith("question<|im_end|>\n<|im_start|>assistant\n") and "Help." in decode(row.prompt)
    assert (decode(row.chosen), decode(row.rejected)) == ("better<|im_end|>", "worse one<|im_end|>")
    assert not held_out
    assert tokens.num_tokens == row.num_tokens
    assert tokens.lengths() == [len(row.prompt) + len(row.rejected)]


def test_reasoning_belongs_to_the_answer(tiny_deepseek_v3, registry, tmp_path) -> None:
    base = import_model(str(tiny_deepseek_v3), name="tiny-r1", registry=registry)
    tokens = tokenise_pairs(loaded(pair("1+1?", "2", "3", reasoning="one and one")), base, DATA, LIMITS, tmp_path)
    (row,), _ = tokens.rows()
    assert "one and one" in training_tokenizer(base).decode(row.chosen)


def test_a_long_answer_is_cut_and_counted(base, tmp_path, caplog) -> None:
    tokens = tokenise_pairs(loaded(pair("question", "better", "no " * 80)), base, DATA, LIMITS, tmp_path)
    assert tokens.num_cut == 1 and tokens.lengths() == [64]
    assert "1 pairs have an answer that was cut" in caplog.text


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pair("why " * 90, "better", "worse"), "leaves no room for an answer in train.max_length=64"),
        (pair("question", "same " * 90 + "better", "same " * 90 + "worse"), "answers are equal within train.max_length=64"),
    ],
)
def test_a_pair_that_does_not_fit_is_left_out_with_the_reason(base, tmp_path, caplog, bad, reason) -> None:
    rows = loaded(pair("question", "better", "worse"), bad)
    tokens = tokenise_pairs(rows, base, DATA.model_copy(update={"max_bad_share": 0.5}), LIMITS, tmp_path)
    assert (tokens.num_rows, tokens.num_rejected) == (1, 1)
    assert reason in caplog.text
    with pytest.raises(TooManyBadRows, match=r"1 of \d+ pairs do not fit train\.max_length=64"):
        tokenise_pairs(rows, base, DATA, LIMITS, tmp_path)
    with pytest.raises(NothingToTrain, match="None of the 1 rows"):
        tokenise_pairs(loaded(bad), base, DATA.model_copy(update={"max_bad_share": 1.0}), LIMITS, tmp_path / "other")


def test_held_out_pairs_are_kept_apart_and_the_cache_is_used_again(base, tmp_path) -> None:
    rows = loaded(*[pair(f"question {i}", "better", "worse") for i in range(10)])
    limits = PairLimits(max_length=64, eval_share=0.3, eval_limit=400, seed=1)
    first = tokenise_pairs(rows, base, DATA, limits, tmp_path)
    train, held_out = first.rows()
    assert (len(train), len(held_out), first.num_rows, first.num_held_out) == (7, 3, 7, 3)
    stamp = first.path.stat().st_mtime_ns
    assert tokenise_pairs(rows, base, DATA, limits, tmp_path) == first
    assert first.path.stat().st_mtime_ns == stamp
    assert tokenise_pairs(rows, base, DATA, LIMITS, tmp_path).path != first.path
