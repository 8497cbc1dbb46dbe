"""What a soft prompt begins as, settled in the driver from the data and the base."""

from __future__ import annotations

import json

import pytest

from r1ray.config import load_config
from r1ray.errors import InvalidValue
from r1ray.model.importer import import_model
from r1ray.model.load import load_tokenizer
from r1ray.train.config import FinetuneConfig
from r1ray.train.objective import objective_of
from r1ray.train.soft_prompt import resolve_soft_prompt


@pytest.fixture
def base(tiny_qwen2, registry):
    return import_model(str(tiny_qwen2), name="tiny", registry=registry)


def settled(base, path, *changes, method="prefix"):
    """(the settled prompt, what was said)"""
    config = load_config(FinetuneConfig, None, ["name=t", f"data.path={path}", f"train.method={method}", *changes])
    said: list[str] = []
    rows = objective_of(config.train.objective).read(config)
    return resolve_soft_prompt(config, rows, base, said.append).train.prompt, said


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("text,category\nwhere is it,card_arrival\nmine is late,card_arrival\nit was declined,declined_payment\n", "utf-8")
    return path


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_labels_stand_in_the_text_once_each_as_they_are_answered(method, base, table) -> None:
    prompt, said = settled(base, table, "train.prompt.init_text=Intents are {labels}.", method=method)
    assert prompt.init_text == "Intents are card arrival, declined payment."
    num_tokens = len(load_tokenizer(base)(prompt.init_text)["input_ids"])
    assert prompt.num_virtual_tokens % 32 == 0 and 0 <= prompt.num_virtual_tokens - num_tokens < 32
    assert len(said) == 1 and f"{num_tokens} tokens" in said[0] and "card arrival" in said[0]


def test_intents_of_annotated_dialogues_are_labels_too(base, tmp_path) -> None:
    path = tmp_path / "dialogues.jsonl"
    turns = [{"role": "user", "text": "挂失我的卡"}, {"role": "assistant", "text": "好的", "annotations": {"intent": "挂失"}}]
    path.write_text(json.dumps({"conversation_id": "1", "utterances": turns}, ensure_ascii=False) + "\n", "utf-8")
    prompt, _ = settled(base, path, "train.prompt.init_text='意图: {labels}'")
    assert prompt.init_text == "意图: 挂失"


def test_a_shorter_soft_prompt_says_how_much_of_its_text_it_holds(base, table) -> None:
    prompt, said = settled(base, table, "train.prompt.init_text=" + "word " * 100, "train.prompt.num_virtual_tokens=64")
    assert prompt.num_virtual_tokens == 64
    assert "its first 64 of " in said[0]


def test_without_a_text_it_is_one_block(base, table) -> None:
    prompt, said = settled(base, table, "train.prompt.init_text=null")
    assert prompt.num_virtual_tokens == 32 and not said


def test_other_methods_leave_the_text_as_it_is(base, table) -> None:
    prompt, said = settled(base, table, "train.prompt.init_text=Intents are {labels}.", method="lora")
    assert prompt.init_text == "Intents are {labels}." and not said


def test_a_text_longer_than_any_soft_prompt_is_refused(base, table) -> None:
    with pytest.raises(InvalidValue, match=r"at most 1024.*num_virtual_tokens=1024"):
        settled(base, table, "train.prompt.init_text=" + "word " * 1500)


def test_labels_are_refused_where_the_data_has_none(base, tmp_path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("question,answer\nwhen do you open?,at nine\n", "utf-8")
    with pytest.raises(InvalidValue, match=r"no row of .*faq\.csv has an intent"):
        settled(base, path, "train.prompt.init_text=Intents are {labels}.")


def test_labels_are_refused_where_no_dialogue_is_in_memory(base, table) -> None:
    with pytest.raises(InvalidValue, match=r"train\.objective=dpo.*data\.backend=arrow"):
        settled(base, table, "train.objective=dpo", "data.format=labelled", "train.prompt.init_text=Intents are {labels}.")
