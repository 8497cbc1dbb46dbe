"""Mangled text, language and length: each rule drops what it names and nothing else."""

import numpy as np
import pytest

from r1ray.data.clean.contradictions import conflicts
from r1ray.data.clean.language import language_of
from r1ray.data.clean.rules import Broken, check
from r1ray.data.mangled import mangled
from r1ray.data.prepare.config import CleanConfig
from r1ray.types import Conversation, Message


def dialogue(*turns):
    return Conversation(id="x", messages=tuple(Message(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(turns)))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("caf\ufffd au lait", "replacement"),
        ("(cid:12)(cid:7) text", "cid"),
        ("text \ue001\ue002", "private"),
        ("a\x07b", "control"),
        ("我的卡丢了".encode().decode("cp1252", "replace"), "utf8_latin"),
        ("The customer’s café".encode().decode("cp1252"), "utf8_latin"),
        ("锟斤拷锟斤拷", "utf8_gbk"),
        ("你好，我的卡".encode().decode("gbk", "replace"), "utf8_gbk"),
    ],
)
def test_each_kind_of_damage_is_seen(text, kind):
    assert mangled(text).kinds.get(kind)
    assert 0 < mangled(text).share <= 1


@pytest.mark.parametrize(
    "text",
    [
        "我的信用卡丢了，怎么办？",
        "I lost my card.",
        "café, naïve, Ångström, façade",
        "浙江的涓涓细流，还有鐨字",
        "tab\tand\nbreak",
        "ï»",
        "ç a",
    ],
)
def test_sound_text_is_not_mangled(text):
    assert mangled(text).share == 0


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我想查一下信用卡的额度", "zh"),
        ("ATM限额多少", "zh"),
        ("How do I reset my PIN?", "en"),
        ("card arrival", "en"),
        ("12345", "en"),
        ("クレジットカードをなくしました", "other"),
        ("카드를 잃어버렸어요", "other"),
        ("Я потерял карту", "other"),
        ("Ich habe meine Karte verloren und kann nicht zahlen", "other"),
        ("J'ai perdu ma carte et je ne peux pas payer", "other"),
        ("Mi café was charged twice at El Corte, please help me", "en"),
    ],
)
def test_language_is_told(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("turns", "step", "reason"),
    [
        (("\ufffd\ufffd\ufffd help", "ok"), "mangled", "more than 2.0%"),
        (("x", "ok"), "length", "turn 1 is a question of 1 characters, outside 2 to 8000"),
        (("y" * 9000, "ok"), "length", "question of 9000"),
        (("Я потерял карту", "Хорошо"), "language", "language other, kept are zh, en"),
        (("hello", "a") * 40, "length", "80 turns, more than 64"),
    ],
)
def test_a_broken_dialogue_names_its_rule(turns, step, reason):
    with pytest.raises(Broken, match=reason) as caught:
        check(dialogue(*turns), CleanConfig())
    assert caught.value.step == step


def test_a_sound_dialogue_passes_with_its_language():
    assert check(dialogue("我的卡丢了", "请挂失"), CleanConfig()) == "zh"


def keys(*numbers):
    return np.array(numbers, np.uint64)


def test_the_majority_keeps_its_answer_and_a_draw_keeps_none():
    found = conflicts(keys(1, 1, 1, 2, 2, 3), keys(7, 7, 8, 7, 8, 9), np.zeros(6, np.uint8), "majority")
    assert {question: conflict.kept for question, conflict in found.items()} == {1: 7, 2: None}
    assert (found[1].num_rows, found[1].num_agreeing) == (3, 2)


def test_drop_keeps_no_contested_answer():
    assert conflicts(keys(1, 1, 1), keys(7, 7, 8), np.zeros(3, np.uint8), "drop")[1].kept is None


def test_the_domain_overrules_history_however_many_rows_that_has():
    found = conflicts(keys(1, 1, 1, 1), keys(7, 8, 8, 8), np.array([0, 2, 2, 2], np.uint8), "majority")
    assert found[1].kept == 7


def test_no_question_no_conflict():
    assert conflicts(keys(), keys(), np.zeros(0, np.uint8), "majority") == {}
