"""The order of turns: what strict refuses and what repair makes of it."""

import pytest

from r1ray.data.records import BadRow
from r1ray.data.turns import check_order, repair
from r1ray.types import Annotations, Message

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def turns(letters):
    return [Message(role=ROLES[letter], content=f"{letter}{i}") for i, letter in enumerate(letters)]


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "uataua", "uatta"])
def test_alternating_turns_are_accepted(letters):
    check_order(turns(letters))


@pytest.mark.parametrize(
    ("letters", "reason"),
    [
        ("aua", "turn 1 is assistant at the start; expected system or user"),
        ("uua", "turn 2 is user after user; expected assistant"),
        ("uaa", "turn 3 is assistant after assistant; expected user or tool"),
        ("usa", "turn 2 is system after user; expected assistant"),
        ("uau", "the last turn is user; a dialogue must end with an assistant turn"),
        ("s", "the last turn is system; a dialogue must end with an assistant turn"),
        ("", "no turns"),
    ],
)
def test_turns_out_of_order_are_refused_with_their_position(letters, reason):
    with pytest.raises(BadRow) as caught:
        check_order(turns(letters))
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("letters", "repaired"),
    [
        ("aua", ["u1", "a2"]),
        ("saua", ["s0", "u2", "a3"]),
        ("uua", ["u0\nu1", "a2"]),
        ("uaau", ["u0", "a1\na2"]),
        ("uatta", ["u0", "a1", "t2", "t3", "a4"]),
        ("uu", []),
    ],
)
def test_repair_joins_and_drops_what_has_no_partner(letters, repaired):
    assert [m.content for m in repair(turns(letters))] == repaired


def test_joined_turns_keep_reasoning_and_the_last_annotations():
    lost, found = Annotations(intent="lost"), Annotations(intent="found")
    answers = [
        Message(role="user", content="?"),
        Message(role="assistant", content="a", reasoning="x", annotations=lost),
        Message(role="assistant", content="b", reasoning="y", annotations=found),
    ]
    assert repair(answers)[1] == Message(role="assistant", content="a\nb", reasoning="x\ny", annotations=found)
