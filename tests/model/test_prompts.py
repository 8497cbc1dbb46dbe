"""Passages in a prompt: marks, order, language, citations."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.model.prompts import CITATION, detect_language, with_passages
from r1ray.types import Passage

PASSAGES = [Passage(id="a", text="Fees are 1%.", source="a.md"), Passage(id="b", text="Open at {9}.", source="b.md")]
TODAY = datetime.date(2025, 9, 5)


def test_without_passages_the_question_stays():
    assert with_passages("How much?", []) == "How much?"


def test_compact_holds_marks_and_question_only():
    assert with_passages("How much?", PASSAGES, style="compact") == (
        "[webpage 1 begin]Fees are 1%.[webpage 1 end]\n[webpage 2 begin]Open at {9}.[webpage 2 end]\nHow much?"
    )


def test_official_english_has_results_rules_date_and_question_in_this_order():
    prompt = with_passages("How {much}?", PASSAGES, today=TODAY)
    parts = ["# Search results", "[webpage 1 begin]Fees are 1%.[webpage 1 end]", "[citation:X]", "Today is 2025-09-05.", "How {much}?"]
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places)
    assert prompt.endswith("# The user's message:\nHow {much}?")


def test_official_chinese_follows_the_question():
    prompt = with_passages("手续费多少？", PASSAGES, today=TODAY)
    assert prompt.startswith("# 与用户消息相关的搜索结果：\n[webpage 1 begin]")
    assert "今天是2025年9月5日。" in prompt
    assert prompt.endswith("# 用户消息：\n手续费多少？")


def test_a_given_language_wins():
    assert "今天是" in with_passages("How much?", PASSAGES, language="zh", today=TODAY)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我的ATM限额多少", "zh"),
        ("What does 你好 mean?", "en"),
        ("1234", "en"),
        ("", "en"),
        ("请用 Visa 卡付款", "zh"),
    ],
)
def test_the_language_is_that_of_most_words(text, language):
    assert detect_language(text) == language


@given(st.lists(st.integers(1, 99), max_size=5))
def test_citations_are_found_in_order(numbers):
    text = "fact ".join(f"[citation:{n}]" for n in numbers)
    assert [int(n) for n in CITATION.findall(text)] == numbers
