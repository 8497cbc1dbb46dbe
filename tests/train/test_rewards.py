"""Rewards by rule, case by case; names, advantages, and a user's own function."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from r1ray.errors import InvalidValue, TrainingError
from r1ray.registry import Registry
from r1ray.train.rewards import build_scales
from r1ray.train.rewards.base import Answer, Scale, advantages, column_names, judged
from r1ray.train.rewards.config import (
    CallReward,
    ExactReward,
    ExplanationReward,
    ForbiddenReward,
    FormatReward,
    LengthReward,
    NoveltyReward,
    OverlapReward,
    RegexReward,
)
from r1ray.train.rewards.model import Modelled, load_call
from r1ray.types import Message


def answer(content: str, *, reasoning: str | None = None, text: str | None = None, group: int = 0, num: int = 5, **more) -> Answer:
    said = text if text is not None else content if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{content}"
    question = more.pop("question", "How do I pay?")
    shown = {"prompt": (Message(role="user", content=question),), "reference": "By card.", "is_finished": True} | more
    return Answer(text=said, content=content, reasoning=reasoning, group=group, num_tokens=num, **shown)


def scores(reward, *answers: Answer, registry: Registry | None = None) -> list[float]:
    (scale,) = build_scales([reward], registry)
    return [row[0] for row in judged([scale], answers)]


def test_exact_counts_words_not_signs() -> None:
    reward = ExactReward(axis="exact", kind="exact")
    assert scores(reward, answer("by CARD"), answer("By card!"), answer("By card, or cash"), answer("")) == [1, 1, 0, 0]


def test_overlap_grows_with_the_shared_words() -> None:
    some, all_, none = scores(OverlapReward(axis="helpful", kind="overlap"), answer("by cash"), answer("By card."), answer("no"))
    assert (all_, none) == (1, 0) and 0 < some < 1


def test_format_wants_reasoning_then_an_answer_then_the_end() -> None:
    cases = {
        "<think>\na\n</think>\n\nb": 1.0,
        "a</think>b": 0.0,
        "<think>a<think></think>b": 0.0,
        "<think>a</think>b</think>": 0.0,
        "b": 0.0,
    }
    for text, wanted in cases.items():
        assert scores(FormatReward(axis="format", kind="format"), answer("b", reasoning="a", text=text)) == [wanted], text
    empty = [answer("", reasoning="a"), answer("b", reasoning="", text="<think></think>b"), answer("b", reasoning="a", is_finished=False)]
    assert scores(FormatReward(axis="format", kind="format"), *empty) == [0, 0, 0]


def test_length_is_a_window_with_slopes() -> None:
    reward = LengthReward(axis="short", kind="length", low=4, high=10)
    assert scores(reward, *(answer("x", num=num) for num in (0, 2, 4, 10, 15, 20, 99))) == [0, 0.5, 1, 1, 0.5, 0, 0]
    characters = LengthReward(axis="short", kind="length", high=4, unit="characters")
    assert scores(characters, answer("1234"), answer(" 12 "), answer("123456")) == [1, 1, 0.5]


def test_forbidden_words_and_personal_data_cost_everything() -> None:
    reward = ForbiddenReward(axis="safe", kind="forbidden", words=("guaranteed profit", "保本"))
    clean, word, chinese, card, hidden, part = scores(
        reward,
        answer("Order 4242 is on its way."),
        answer("A Guaranteed  Profit!"),
        answer("这个产品保本"),
        answer("Your card 4111 1111 1111 1111 is active"),
        answer("fine", reasoning="write to ann@bank.com"),
        answer("unguaranteed profits"),
    )
    assert (clean, word, chinese, card, hidden, part) == (1, 0, 0, 0, 0, 1)
    assert scores(ForbiddenReward(axis="safe", kind="forbidden", personal_data=()), answer("ann@bank.com")) == [1]


def test_novelty_is_what_the_others_of_the_group_do_not_say() -> None:
    reward = NoveltyReward(axis="novel", kind="novelty")
    same, twin, other, alone, empty = scores(
        reward,
        answer("you can pay by card"),
        answer("You can pay by card."),
        answer("cheques work too"),
        answer("you can pay by card", group=1),
        answer("", group=1),
    )
    assert (same, twin, other, alone, empty) == (0, 0, 1, 1, 0)
    assert scores(reward, answer("no no no no no")) == [0.25], "one distinct pair of four"
    assert scores(reward, answer("可以刷卡"), answer("可以付现")) == pytest.approx([2 / 3, 2 / 3])


def test_explanations_give_reasons_and_sources() -> None:
    reasons = ExplanationReward(axis="explainable", kind="explanation", wanted=2)
    assert scores(reasons, answer("Because it is late, and therefore closed."), answer("It is late because."), answer("Sincerely")) == [
        1,
        0.5,
        0,
    ]
    assert scores(reasons, answer("因为太晚，所以关门")) == [1]
    both = ExplanationReward(axis="explainable", kind="explanation", citations=True)
    question = "[webpage 1 begin]open at 9[webpage 1 end]\nWhen?"
    assert scores(both, answer("At 9 because [citation:1]", question=question), answer("At 9 [citation:2]", question=question)) == [1, 0]
    with pytest.raises(ValueError, match="neither markers nor citations"):
        ExplanationReward(axis="explainable", kind="explanation", wanted=0)


def test_a_pattern_looks_where_it_is_told() -> None:
    said = answer("b 12", reasoning="a 7")
    for where, pattern, wanted in (("answer", "^b", 1), ("answer", "7", 0), ("reasoning", "7", 1), ("all", "</think>", 1)):
        assert scores(RegexReward(axis="x", kind="regex", pattern=pattern, where=where), said) == [wanted]


def test_a_function_of_the_user_judges_and_its_faults_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_rewards.py").write_text("def brief(answers):\n    return [1 / a.num_tokens for a in answers]\nnothing = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scores(CallReward(axis="own", kind="python", call="own_rewards:brief"), answer("x", num=4)) == [0.25]
    for call, says in (("own_rewards:absent", "absent"), ("no_such_module:f", "No module"), ("own_rewards:nothing", "no function")):
        with pytest.raises(InvalidValue, match=says):
            load_call(call)
    sys.modules.pop("own_rewards")


def test_a_reward_model_reads_dialogues_and_bare_answers() -> None:
    class Longest:
        def score(self, prompts, answers):
            return [len(prompt[-1].content) + len(text) for prompt, text in zip(prompts, answers, strict=True)]

    assert Modelled(Longest()).score([answer("four", reasoning="much longer", question="ab")]) == [6]


def test_a_judge_that_gives_no_numbers_is_named() -> None:
    class Bad:
        def __init__(self, *values):
            self.values = values

        def score(self, answers):
            return self.values

    for values, says in (((1.0,), "1 numbers"), ((1.0, math.nan), "nan")):
        with pytest.raises(TrainingError, match=rf"Reward tone gave {says} for 2 answers"):
            judged([Scale("tone", 1.0, Bad(*values))], [answer("a"), answer("b")])


def test_axes_that_share_a_name_stay_apart() -> None:
    assert column_names([("safe", "forbidden"), ("helpful", "overlap"), ("safe", "model"), ("safe", "model")]) == [
        "safe_forbidden",
        "helpful",
        "safe_model",
        "safe_model#2",
    ]


def test_the_advantage_normalises_each_axis_before_it_is_weighted() -> None:
    rewards = [[0.0, 100.0], [1.0, 100.0], [1.0, 300.0], [0.0, 300.0]]
    even = advantages(rewards, [1.0, 1.0], 4)
    assert even[2] == pytest.approx(-even[0], rel=1e-6) and even[1] == pytest.approx(even[3], abs=1e-3), "200 points weigh no more than 1"
    only = advantages(rewards, [1.0, 0.0], 4)
    assert only[1] == only[2] > 0 > only[0] == only[3]
    agreed = advantages([[1.0], [1.0], [0.0], [1.0]], [1.0], 2)
    assert agreed[0] == agreed[1], "a group that agrees says nothing about who is better"
    grouped = torch.tensor(advantages([[1.0], [0.0], [9.0], [5.0]], [1.0], 2))
    assert grouped[0] == pytest.approx(float(grouped[2]), rel=1e-3), "each group by its own scale"
