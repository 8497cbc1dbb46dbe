"""Prompts that are held out: whole origins, so that no other wording of them is trained on."""

from __future__ import annotations

import pytest

from r1ray.data.config import DataConfig
from r1ray.data.records import Loaded
from r1ray.model.importer import import_model
from r1ray.train.prompts import PromptLimits, prepare_prompts
from r1ray.types import Conversation, Message

DATA = DataConfig(path="x")


def row(name: str) -> Conversation:
    turns = (Message(role="user", content=f"question {name}"), Message(role="assistant", content="answer"))
    return Conversation(id=name, messages=turns, source=f"f:{name}")


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_held_out_prompt_takes_all_that_were_made_from_it_along(base, tmp_path, seed) -> None:
    rows = tuple(row(f"{n}{mark}") for n in range(20) for mark in ("", "#masked"))
    loaded = Loaded(conversations=rows, rejects=(), data_hash="d", formats=("messages",), num_rows=len(rows))
    found = prepare_prompts(loaded, base, DATA, PromptLimits(max_tokens=99, num_held_out=7, seed=seed), tmp_path)
    asked = [[prompt.messages[0].content.removesuffix("#masked") for prompt in side] for side in (found.rows(), found.held_out())]
    assert (len(asked[0]), len(asked[1])) == (34, 6), "the three origins that fit"
    assert not set(asked[0]) & set(asked[1])
    again = prepare_prompts(loaded, base, DATA, PromptLimits(max_tokens=99, num_held_out=7, seed=seed), tmp_path / "other")
    assert list(again.held_out()) == list(found.held_out())
