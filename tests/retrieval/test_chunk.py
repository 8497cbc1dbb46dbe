"""Markdown and text become passages: by heading, nothing lost, nothing that belongs together cut."""

import re

from hypothesis import given
from hypothesis import strategies as st

from r1ray.retrieval.chunk import chunk_document, slug
from r1ray.retrieval.config import ChunkConfig
from r1ray.retrieval.documents import Document

SMALL = ChunkConfig(max_chars=80, min_chars=10)


def chunks(text, config=SMALL, name="doc.md"):
    return chunk_document(Document(name, text), config)


def test_each_section_becomes_one_passage_with_its_heading_path():
    found = chunks("intro\n\n# Cards\n\n## Lost card\nCall us.\n\n## 挂失\n请致电客服。\n\n# Loans\nAsk.\n")
    assert [(c.id, c.heading, c.text) for c in found] == [
        ("doc.md", "", "intro"),
        ("doc.md#lost-card", "Cards > Lost card", "Call us."),
        ("doc.md#挂失", "Cards > 挂失", "请致电客服。"),
        ("doc.md#loans", "Loans", "Ask."),
    ]


def test_underlined_headings_count_and_rules_do_not():
    found = chunks("Title\n=====\nbody\n\nSub\n---\nmore\n\n---\n\nend\n")
    assert [c.heading for c in found] == ["Title", "Title > Sub"]
    assert found[1].text == "more\n\n---\n\nend"


def test_repeated_headings_get_distinct_ids_in_order():
    found = chunks("# A\none\n# A\ntwo\n# A-1\nthree\n")
    assert [c.id for c in found] == ["doc.md#a", "doc.md#a-1", "doc.md#a-1-1"]


def test_a_heading_without_body_stays_only_when_it_introduces_nothing():
    assert [(c.heading, c.text) for c in chunks("# Parent\n## Child\ntext\n# Lonely\n")] == [
        ("Parent > Child", "text"),
        ("Lonely", "Lonely"),
    ]


def test_hash_lines_inside_a_fence_are_no_headings():
    found = chunks("# Run\n```sh\n# not a heading\nls\n```\n~~~\n```\n# nor this\n~~~\n")
    assert len(found) == 1
    assert "# not a heading" in found[0].text


def test_fences_and_tables_are_never_cut():
    fence = "```python\n" + "x = 1\n\n" * 30 + "```"
    table = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 20
    texts = [c.text for c in chunks(f"# H\nBefore.\n\n{fence}\n{table}\nAfter, a sentence long enough to stand alone.\n")]
    assert fence in texts
    assert table.strip() in texts


def test_long_chinese_text_is_split_at_full_stops():
    sentence = "银行卡遗失后应立即致电客服热线办理挂失手续。"
    found = chunks("# 挂失\n" + sentence * 12)
    assert len(found) > 2
    assert all(c.text.endswith("。") and len(c.text) <= 80 for c in found)
    assert [c.id for c in found[:2]] == ["doc.md#挂失", "doc.md#挂失:2"]


def test_long_english_text_is_split_at_sentences_not_at_decimal_points():
    found = chunks("# Fees\n" + "The fee is 1.5 percent per month. " * 10)
    assert all(c.text.endswith("month.") for c in found)


def test_a_closing_quote_stays_with_its_sentence():
    assert all(not c.text.startswith("”") for c in chunks("# 话\n" + "客服说：“请稍候片刻，马上为您办理。”" * 10))


def test_a_short_remainder_joins_the_piece_before_it():
    found = chunks("# H\n" + "A" * 79 + "\n\nend.\n")
    assert [len(c.text) for c in found] == [85]


def test_a_short_section_stays_whole_whatever_it_holds():
    assert [c.text for c in chunks("# H\na\n\nb\n\n- c\n- d\n")] == ["a\n\nb\n\n- c\n- d"]


def test_front_matter_is_left_out_and_plain_text_has_no_headings():
    assert [c.text for c in chunks("---\ntitle: x\n---\nbody\n")] == ["body"]
    assert [(c.id, c.heading, c.text) for c in chunks("# a comment\nls", name="run.txt")] == [("run.txt", "", "# a comment\nls")]


def test_an_empty_document_gives_nothing():
    assert chunks("") == []
    assert chunks("\n \n") == []


def test_slugs_are_githubs_anchors():
    assert slug("What's a PIN? (FAQ)") == "whats-a-pin-faq"
    assert slug("信用卡 挂失") == "信用卡-挂失"


LINES = st.sampled_from(
    ["# 标题", "## Head", "文字。更多文字！", "One. Two three? Four.", "", "| a | b |", "```", "- item", "x" * 30, "词" * 95]
)


@given(st.lists(LINES, max_size=40))
def test_no_word_is_lost_or_doubled_and_ids_are_unique(lines):
    found = chunks("\n".join(lines))
    assert len({c.id for c in found}) == len(found)
    body = "".join(re.sub(r"\s", "", c.text) for c in found)
    for word in ("更多文字", "Twothree", "item", "x" * 30, "词", "|a|b|"):
        assert body.count(word) == "".join(re.sub(r"\s", "", line) + "\0" for line in lines).count(word)


@given(st.text(alphabet="ab 。，.!\n词", max_size=600))
def test_the_pieces_of_a_section_joined_are_its_body(body):
    found = chunks(body, name="plain.txt")
    assert re.sub(r"\s", "", "".join(c.text for c in found)) == re.sub(r"\s", "", body)
    assert all(len(c.text) <= SMALL.max_chars + SMALL.min_chars + 2 for c in found)
