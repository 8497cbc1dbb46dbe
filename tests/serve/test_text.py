"""Token ids to text: nothing shown is ever taken back, nothing is lost, and counts are exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.serve.text import Detokeniser, StopScanner, TextAssembler


def decode(ids):
    return bytes(ids).decode(errors="replace")


def test_chinese_is_never_shown_in_halves() -> None:
    machine = Detokeniser(decode)
    shown = [machine.feed((byte,)) for byte in "你好，R1！".encode()]
    assert "".join(shown) == "你好，R1！"
    assert not any("\ufffd" in text for text in shown)


def test_broken_bytes_come_out_at_the_end() -> None:
    machine = Detokeniser(decode)
    assert [machine.feed((byte,)) for byte in b"ok\xe4"] == ["o", "k", ""]
    assert machine.flush() == "\ufffd"


@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_detokenised_text_is_the_text(text: str, sizes: list[int]) -> None:
    data, machine, shown, at = text.encode(), Detokeniser(decode), "", 0
    for size in [*sizes, len(data)]:
        shown += machine.feed(data[at : at + size])
        at += size
    assert shown + machine.flush() == text


def test_detokeniser_agrees_with_a_real_tokenizer(tiny_llama) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "我的信用卡丢了 my credit card, 谢谢！"
    machine = Detokeniser(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    shown = [machine.feed((token,)) for token in tokenizer.encode(text)]
    assert "".join(shown) + machine.flush() == text
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize(
    ("stops", "chunks", "expected"),
    [
        (["STOP"], ["abcST", "OPdef"], "abc"),
        (["STOP"], ["abcST", "ILL"], "abcSTILL"),
        (["\n\n", "</s>"], ["one\n", "\ntwo</s>"], "one"),
        (["aab"], ["aaab"], "a"),
        ([], ["abc"], "abc"),
        (["停止"], ["好的停", "止了"], "好的"),
    ],
)
def test_stop_texts_are_cut_out_across_chunks(stops: list[str], chunks: list[str], expected: str) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(chunk) for chunk in chunks)
    assert shown + ("" if scanner.stopped else scanner.flush()) == expected


@given(st.text("abS\n", max_size=30), st.lists(st.text("abS\n", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_no_part_of_a_stop_text_is_ever_shown(text: str, stops: list[str], size: int) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    scanner, shown = StopScanner(stops), ""
    for at in range(0, len(text), size):
        shown += scanner.feed(text[at : at + size])
        assert expected.startswith(shown)
    shown += "" if scanner.stopped else scanner.flush()
    assert shown == expected


def assemble(text: str, *, stops=(), prefilled: bool | None) -> SimpleNamespace:
    machine = TextAssembler(decode, stops, prefilled=prefilled)
    deltas = []
    for byte in text.encode():
        deltas.append(machine.feed((byte,)))
        if machine.stopped:
            break
    else:
        deltas.append(machine.flush())
    return SimpleNamespace(
        reasoning="".join(d.reasoning for d in deltas),
        content="".join(d.content for d in deltas),
        num_tokens=machine.num_tokens,
        num_reasoning=machine.num_reasoning_tokens,
        shown=sum(d.num_tokens for d in deltas),
    )


def test_prefilled_reasoning_is_split_and_counted_to_the_token() -> None:
    found = assemble("想一想</think>\n\n答案", prefilled=True)
    assert (found.reasoning, found.content) == ("想一想", "答案")
    assert found.num_reasoning == len("想一想</think>".encode())
    assert found.num_tokens == found.shown == len("想一想</think>\n\n答案".encode())


def test_an_own_think_tag_counts_too_and_plain_text_has_no_reasoning() -> None:
    own = assemble("<think>hm</think>yes", prefilled=False)
    assert (own.reasoning, own.content, own.num_reasoning) == ("hm", "yes", len("<think>hm</think>"))
    plain = assemble("yes <think>", prefilled=False)
    assert (plain.reasoning, plain.content, plain.num_reasoning) == ("", "yes <think>", 0)


def test_reasoning_that_is_cut_off_is_all_reasoning() -> None:
    found = assemble("still thinking", prefilled=True)
    assert (found.reasoning, found.content, found.num_reasoning) == ("still thinking", "", len("still thinking"))


def test_a_stop_text_ends_the_answer_but_not_the_thinking() -> None:
    found = assemble("a\n\nb</think>c\n\nd", stops=("\n\n",), prefilled=True)
    assert (found.reasoning, found.content) == ("a\n\nb", "c")
    assert found.num_tokens == len("a\n\nb</think>c\n\n")


def test_raw_text_is_not_split() -> None:
    found = assemble("a</think>b", prefilled=None)
    assert (found.reasoning, found.content, found.num_reasoning) == ("", "a</think>b", 0)
