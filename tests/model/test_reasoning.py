"""R1's reasoning apart from its answer, however the stream is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.model.reasoning import ReasoningParser, split

# Pieces that meet at every interesting border: whole tags, parts of tags, white space, text.
FRAGMENTS = ["<think>", "</think>", "<", "</", "</th", "think>", "ink>", " ", "\n", "\n\n", "a", "答案", "x < y", ">"]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "prefilled", "reasoning", "content"),
    [
        ("First I look.\n</think>\n\nIt is 42.", True, "First I look.", "It is 42."),
        ("<think>\nFirst I look.\n</think>\n\nIt is 42.", False, "First I look.", "It is 42."),
        ("<think>\nrepeated tag</think>x", True, "repeated tag", "x"),
        ("\n\n</think>\n\nNo thought needed.", True, None, "No thought needed."),
        ("It is 42.", False, None, "It is 42."),
        ("  It is 42.\n", False, None, "  It is 42.\n"),
        ("cut off in the mid", True, "cut off in the mid", ""),
        ("<think>cut off</thi", False, "cut off</thi", ""),
        ("<thi", False, None, "<thi"),
        ("", True, None, ""),
        ("a <think>b</think>", False, None, "a <think>b</think>"),
        ("one</think>two</think> three", True, "one", "two</think> three"),
    ],
)
def test_split_gives_reasoning_and_answer(text, prefilled, reasoning, content):
    assert split(text, prefilled) == (reasoning, content)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=8), prefilled=st.booleans())
def test_any_chunking_gives_what_split_gives(text, cuts, prefilled):
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = ReasoningParser(prefilled)
    pieces = [piece for start, end in itertools.pairwise(borders) for piece in parser.feed(text[start:end])]
    pieces += parser.flush()
    joined = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("reasoning", "content")}
    assert (joined["reasoning"] or None, joined["content"]) == split(text, prefilled)
    assert all(piece.text for piece in pieces)


@given(text=TEXTS, prefilled=st.booleans())
def test_feeding_single_characters_gives_what_split_gives(text, prefilled):
    parser = ReasoningParser(prefilled)
    pieces = [piece for char in text for piece in parser.feed(char)] + parser.flush()
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == split(text, prefilled)[1]


def test_content_is_not_held_back_once_it_flows():
    parser = ReasoningParser(prefilled=True)
    parser.feed("hm</think>")
    assert [piece.text for piece in parser.feed("\nThe <")] == ["The <"]


def test_the_parser_says_whether_it_is_thinking():
    parser = ReasoningParser(prefilled=True)
    assert parser.thinking
    parser.feed("hm")
    assert parser.thinking
    parser.feed("</think>ok")
    assert not parser.thinking
