"""The demo set keeps its promises: deterministic, balanced, held out for real, grounded, cited."""

import difflib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from r1ray.data.bank.wording import KNOWLEDGE, load_wording
from r1ray.data.config import DataConfig
from r1ray.data.demo import SYSTEM_PROMPT, demo_conversations, write_demo
from r1ray.data.read import read_conversations
from r1ray.model.prompts import CITATION, detect_language

SETS = {split: demo_conversations(split) for split in ("train", "test")}
BOTH = [pytest.param(split, id=split) for split in SETS]
PASSAGE = re.compile(r"\[webpage (\d+) begin\](.*?)\[webpage \d+ end\]")


def language(conversation):
    return conversation.id.split("-")[2]


def exchanges(split):
    for conversation in SETS[split]:
        turns = conversation.messages
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            yield conversation, question, answer


def phrases(wording, split):
    return {p for intent in wording.intents.values() for group in (intent.phrases, intent.vague, intent.answers) for p in group[split]}


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, second, other = write_demo(tmp_path / "a"), write_demo(tmp_path / "b"), write_demo(tmp_path / "c", seed=1)
    for name in ("train", "test"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes()
        assert getattr(first, name).read_bytes() != getattr(other, name).read_bytes()


def test_a_written_demo_reads_back_without_rejects(tmp_path):
    paths = write_demo(tmp_path)
    for split, path in (("train", paths.train), ("test", paths.test)):
        loaded = read_conversations(DataConfig(path=path, max_bad_share=0.0))
        assert loaded.conversations == SETS[split]
    assert {p.relative_to(paths.knowledge) for p in paths.knowledge.rglob("*.md")} == {
        p.relative_to(KNOWLEDGE) for p in KNOWLEDGE.rglob("*.md")
    }


def test_the_sizes_fit_the_quickstart():
    assert 500 <= len(SETS["train"]) <= 700
    assert 120 <= len(SETS["test"]) <= 160
    assert len(SYSTEM_PROMPT.split()) <= 6


@pytest.mark.parametrize("split", BOTH)
def test_intents_are_balanced_in_each_language(split):
    counts = Counter((language(c), c.messages[-1].annotations.intent) for c in SETS[split])
    assert {len({n for (lang, _), n in counts.items() if lang == wanted}) for wanted in ("en", "zh")} == {1}
    assert len(counts) == 2 * 12


@pytest.mark.parametrize("split", BOTH)
def test_a_reply_is_a_json_line_with_the_annotations_and_one_reply(split):
    for _, _, answer in exchanges(split):
        line, reply = answer.content.split("\n")
        expected = {"intent": answer.annotations.intent, "entities": dict(answer.annotations.entities)}
        assert line == json.dumps(expected, ensure_ascii=False)
        assert reply.strip() == reply != ""


@pytest.mark.parametrize("split", BOTH)
def test_every_entity_value_stands_in_the_question(split):
    for _, question, answer in exchanges(split):
        asked = question.content.split("\n")[-1]
        assert all(str(value) in asked for value in answer.annotations.entities.values())


@pytest.mark.parametrize("split", BOTH)
def test_question_and_reply_are_in_the_dialogues_language(split):
    for conversation, question, answer in exchanges(split):
        asked, reply = question.content.split("\n")[-1], answer.content.split("\n")[1]
        assert {detect_language(asked), detect_language(CITATION.sub("", reply))} == {language(conversation)}


@pytest.mark.parametrize("split", BOTH)
def test_a_third_of_the_dialogues_cite_the_passage_that_holds_the_fact(split):
    wordings = {name: load_wording(name) for name in ("en", "zh")}
    positions = Counter()
    for conversation, question, answer in exchanges(split):
        passages = PASSAGE.findall(question.content)
        cited = [int(number) for number in CITATION.findall(answer.content)]
        assert len(passages) == 2 * len(cited)
        if cited:
            fact = wordings[language(conversation)].intents[answer.annotations.intent].fact
            assert question is conversation.messages[-2]
            assert [int(number) for number, text in passages if fact in text] == cited
            positions[cited[0]] += 1
    assert 0.28 <= positions.total() / len(SETS[split]) <= 0.38
    assert min(positions[1], positions[2]) >= 0.35 * positions.total()


@pytest.mark.parametrize("name", ["en", "zh"])
def test_training_and_test_share_no_phrase_and_no_value(name):
    wording = load_wording(name)
    assert not phrases(wording, "train") & phrases(wording, "test")
    for pool in wording.pools.values():
        assert not set(pool["train"]) & set(pool["test"])
    seen = {(slot, value) for c, _, a in exchanges("train") if language(c) == name for slot, value in a.annotations.entities.items()}
    held = {(slot, value) for c, _, a in exchanges("test") if language(c) == name for slot, value in a.annotations.entities.items()}
    assert held
    assert not {h for h in held if h in seen}


@pytest.mark.parametrize("name", ["en", "zh"])
def test_no_test_phrase_is_a_training_phrase_with_a_word_changed(name):
    for intent in load_wording(name).intents.values():
        known, held = ([re.sub(r"\{\w+\}", "_", p) for p in (*intent.phrases[s], *intent.vague[s])] for s in ("train", "test"))
        for phrase in held:
            assert max(difflib.SequenceMatcher(None, phrase, other).ratio() for other in known) < 0.86, phrase


@pytest.mark.parametrize("name", ["en", "zh"])
def test_every_intent_has_enough_phrases_and_all_hold_the_slots(name):
    for intent in load_wording(name).intents.values():
        assert len(intent.phrases["train"]) + len(intent.vague["train"]) >= 14
        assert len(intent.phrases["test"]) + len(intent.vague["test"]) >= 5
        for group in (intent.phrases, intent.answers):
            for phrase in (*group["train"], *group["test"]):
                assert set(re.findall(r"\{(\w+)\}", phrase)) == set(intent.slots)
        assert set(re.findall(r"\{(\w+)\}", intent.reply)) <= set(intent.slots)


@pytest.mark.parametrize("name", ["en", "zh"])
def test_every_fact_stands_in_its_section_and_reply_only(name):
    wording = load_wording(name)
    for intent in wording.intents.values():
        assert intent.fact in intent.reply
        assert [key for key, section in wording.sections.items() if intent.fact in section.text] == [intent.section]
    for section in wording.sections.values():
        assert len(section.text.split()) <= 60
        assert len(section.text) <= 90 or name == "en"
        assert "\n" not in section.text


@pytest.mark.parametrize("name", ["en", "zh"])
def test_all_training_phrases_are_used(name):
    wording = load_wording(name)
    said = "\n".join(m.content for c in SETS["train"] if language(c) == name for m in c.messages if m.role == "user")
    for intent in wording.intents.values():
        for phrase in intent.phrases["train"]:
            assert re.search(re.sub(r"\\\{\w+\\\}", ".+", re.escape(phrase)), said), phrase


def test_the_knowledge_base_is_package_data():
    assert KNOWLEDGE.is_relative_to(Path(__file__).parents[2] / "r1ray")
    assert len(list(KNOWLEDGE.rglob("*.md"))) == 16
