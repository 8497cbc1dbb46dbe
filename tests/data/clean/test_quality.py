"""The shipped model is what its module says; it catches damage and spares sound text."""

import json
import random

import numpy as np
import pytest

from r1ray.data.clean.corruption import CORRUPTIONS, corrupted, marked_dialogues
from r1ray.data.clean.quality import fit, load, shipped
from r1ray.errors import InvalidValue
from r1ray.types import Conversation, Message


def dialogue(question, answer):
    return Conversation(id="x", messages=(Message(role="user", content=question), Message(role="assistant", content=answer)))


@pytest.fixture(scope="module")
def marked():
    return marked_dialogues("test")


def test_the_shipped_model_is_the_one_that_the_project_trains():
    fresh, stored = fit(*marked_dialogues("train")), shipped()
    assert np.allclose(fresh.weights, stored.weights, atol=0.02)
    assert fresh.bias == pytest.approx(stored.bias, abs=0.05)


def test_on_unseen_dialogues_it_drops_most_of_the_bad_and_hardly_any_good(marked):
    rows, is_bad = marked[0], np.array(marked[1])
    badness = shipped().badness(rows)
    assert (badness[is_bad] >= 0.85).mean() > 0.75
    assert (badness[~is_bad] >= 0.85).mean() < 0.01


@pytest.mark.parametrize(
    "answer",
    ["card arrival", "请在手机银行挂失信用卡，新卡收费15元。", "1. Apples\n2. Pears\n3. Plums", "HTML是一种标记语言。", "x = 3", "Yes."],
)
def test_sound_answers_of_other_domains_are_spared(answer):
    assert shipped().badness([dialogue("What is it?", answer)])[0] < 0.85


@pytest.mark.parametrize(
    "answer", ["........................", "asdkjh qwlkj zxmcnb qwpoei", "<div></div><br/><br/>&nbsp;null", "好的" * 60]
)
def test_broken_answers_are_caught(answer):
    assert shipped().badness([dialogue("How do I block my card?", answer)])[0] >= 0.85


def test_a_model_is_the_same_after_writing_and_reading(tmp_path, marked):
    rows, is_bad = marked[0][:200], marked[1][:200]
    model = fit(rows, is_bad, with_ngrams=True)
    model.save(tmp_path / "q.json")
    assert np.allclose(load(tmp_path / "q.json").badness(rows), model.badness(rows), atol=1e-3)


def test_marks_teach_what_figures_cannot_see():
    good = [dialogue(f"question {n}", f"Please block the card in the app, case {n}.") for n in range(40)]
    bad = [dialogue(f"question {n}", f"Please call our rival in the town, case {n}.") for n in range(40)]
    badness = fit([*good, *bad], [False] * 40 + [True] * 40, with_ngrams=True).badness([*good, *bad])
    assert badness[:40].max() < 0.5 < badness[40:].min()


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"features": ["x"]})])
def test_a_file_that_is_no_model_is_refused(tmp_path, text):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(InvalidValue, match=r"q\.json"):
        load(tmp_path / "q.json")


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
def test_every_corruption_changes_the_answer_or_declines(kind):
    row = dialogue(
        "我的信用卡在公交车上被人偷了怎么办？",
        "请马上在手机银行挂失信用卡，新卡收费15元，十个工作日内寄到您登记的地址，期间请留意短信通知。谢谢您的来电。",
    )
    made = corrupted(row, kind, random.Random(0))
    assert made is not None and made.messages[-1] != row.messages[-1]
    assert made.messages[:-1] == row.messages[:-1]
