"""Held-out sets: stable under order and growth, stratified on request."""

import random
from collections import Counter

import pytest

from r1ray.data.split import hold_out, intent_of, stem, stem_hash
from r1ray.types import Annotations, Conversation, Message


def conversation(name, intent=None):
    answer = Message(role="assistant", content="a", annotations=Annotations(intent=intent) if intent else None)
    return Conversation(id=name, messages=(Message(role="user", content="q"), answer))


ROWS = tuple(conversation(f"c{i}", intent="rare" if i < 3 else f"i{i % 4}") for i in range(403))


def test_a_split_has_about_the_share_and_loses_nothing():
    train, held = hold_out(ROWS, 0.2)
    assert sorted((*train, *held), key=lambda c: int(c.id[1:])) == list(ROWS)
    assert 60 <= len(held) <= 100


def test_a_split_does_not_depend_on_row_order():
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for by_intent in (False, True):
        assert {c.id for c in hold_out(shuffled, 0.2, by_intent=by_intent)[1]} == {
            c.id for c in hold_out(ROWS, 0.2, by_intent=by_intent)[1]
        }


def test_new_rows_move_no_old_one():
    held = {c.id for c in hold_out(ROWS[:300], 0.2)[1]}
    assert held == {c.id for c in hold_out(ROWS, 0.2)[1] if int(c.id[1:]) < 300}


def test_another_seed_gives_another_split():
    assert hold_out(ROWS, 0.2, seed=0)[1] != hold_out(ROWS, 0.2, seed=1)[1]


def test_every_intent_is_held_out_in_proportion():
    train, held = hold_out(ROWS, 0.1, by_intent=True)
    assert Counter(intent_of(c) for c in held) == {"i0": 10, "i1": 10, "i2": 10, "i3": 10, "rare": 1}
    assert {intent_of(c) for c in train} == {intent_of(c) for c in ROWS}


def test_the_only_dialogue_of_an_intent_stays_in_training():
    train, held = hold_out([conversation("x", "one")], 0.5, by_intent=True)
    assert (len(train), len(held)) == (1, 0)


def test_equal_rows_stay_on_one_side():
    rows = [conversation(f"{i:016x}{suffix}", "i") for i in range(50) for suffix in ("", "#2", "#masked", "#2#traps.conflict")]
    for by_intent in (False, True):
        train, held = hold_out(rows, 0.3, by_intent=by_intent)
        assert not {c.id[:16] for c in train} & {c.id[:16] for c in held}
        assert held


def test_no_share_holds_nothing_out():
    assert hold_out(ROWS, 0.0, by_intent=True)[1] == ()


def test_a_limited_sample_is_split_as_evenly_as_the_whole_file(tmp_path):
    from r1ray.data.config import DataConfig
    from r1ray.data.read import read_conversations

    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "\n".join(f"question {n},label" for n in range(400)), encoding="utf-8")
    limited = read_conversations(DataConfig(path=path, limit=100)).conversations
    kept, held = hold_out(limited, 0.2)
    assert len(kept) + len(held) == 100
    assert 8 <= len(held) <= 35


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x#masked", "x"),
        ("x#back_translation", "x"),
        ("x#traps.conflict", "x"),
        ("x#synonyms#2", "x"),
        ("last_year/7#rewrite", "last_year/7"),
        ("0123456789abcdef#2", "0123456789abcdef"),
        ("0123456789abcdef#12#masked", "0123456789abcdef"),
        ("guide-0123456789abcdef#2", "guide-0123456789abcdef"),
        ("tree-card_lost-report-yes#17", "tree-card_lost-report-yes"),
        ("ticket#12", "ticket#12"),
        ("a#1#masked", "a#1"),
        ("x#Y", "x#Y"),
        ("", ""),
    ],
)
def test_a_stem_is_the_id_less_what_r1ray_puts_behind_one(name, expected):
    assert stem(name) == expected
    assert stem_hash(name) == stem_hash(expected)


def test_ids_with_any_characters_have_a_hash():
    assert stem_hash("\ud800#masked") == stem_hash("\ud800") != stem_hash("x")
    assert hold_out([conversation("\ud800"), conversation("b")], 0.5) is not None
