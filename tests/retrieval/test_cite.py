"""Citations of an answer, resolved to passages."""

from r1ray.retrieval.cite import cited, invalid_citations
from r1ray.types import Passage

PASSAGES = [Passage(id=f"p{i}", text="", source="s") for i in (1, 2, 3)]


def test_cited_passages_come_once_in_order_of_mention():
    assert [p.id for p in cited("A[citation:3]. B[citation:1][citation:3].", PASSAGES)] == ["p3", "p1"]


def test_numbers_without_a_passage_are_left_out_and_reported():
    text = "A[citation:0][citation:4]。B[citation:2][citation:99]"
    assert [p.id for p in cited(text, PASSAGES)] == ["p2"]
    assert invalid_citations(text, len(PASSAGES)) == [0, 4, 99]


def test_an_answer_without_citations_cites_nothing():
    assert cited("plain [1] [citation:x]", PASSAGES) == []
