"""Personal data goes, the rest stays; a value has one replacement."""

import pytest

from r1ray.data.clean.pii import Masker, is_bank_card, is_id_card
from r1ray.data.prepare.config import PiiConfig
from r1ray.types import Annotations, Conversation, Message

ID = "11010519491231002X"  # the worked example of GB 11643
CARD = "4111 1111 1111 1111"  # the card industry's test number


def masked(*turns, entities=None, **config):
    messages = [Message(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(turns)]
    if entities is not None:
        messages[-1] = Message(role="assistant", content=turns[-1], annotations=Annotations(intent="i", entities=entities))
    masker = Masker(PiiConfig(**config))
    return masker.mask(Conversation(id="x", messages=tuple(messages))), masker


def contents(*turns, **config):
    return [m.content for m in masked(*turns, **config)[0].messages]


def test_each_kind_is_masked_and_counted():
    dialogue, masker = masked(f"身份证{ID}，卡号{CARD}，电话13812345678，邮箱 li.wei+x@bank.com.cn。", "好的")
    assert dialogue.messages[0].content == "身份证[ID_CARD_1]，卡号[BANK_CARD_1]，电话[MOBILE_1]，邮箱 [EMAIL_1]。"
    assert masker.counts == {"id_card": 1, "bank_card": 1, "mobile": 1, "email": 1}


def test_a_value_has_one_replacement_in_all_turns_and_spellings():
    first, second, third = contents("call +86 138-1234-5678 or 13987654321", "I will call 13812345678.", "yes, 138 1234 5678")
    assert first == "call [MOBILE_1] or [MOBILE_2]"
    assert second == "I will call [MOBILE_1]."
    assert third == "yes, [MOBILE_1]"


@pytest.mark.parametrize(
    "text",
    [
        "身份证110105194912310021",  # wrong check character
        "order 4111111111111112",  # fails Luhn
        "订单号 20231105123452",  # passes Luhn, but no bank's number begins so
        "12000 yuan on 2023-11-05",
        "id 1381234567",  # ten digits
        "hash a13812345678b",
        "me@home",
        "0000000000000000",
    ],
)
def test_what_is_no_personal_data_stays(text):
    assert contents(text, "ok") == [text, "ok"]


def test_names_are_masked_only_where_annotated_and_as_whole_words():
    dialogue, _ = masked("I am Ann, an annual member.", "Hello Ann.", entities={"name": "Ann", "card": "gold"})
    assert [m.content for m in dialogue.messages] == ["I am [NAME_1], an annual member.", "Hello [NAME_1]."]
    assert dict(dialogue.messages[-1].annotations.entities) == {"name": "[NAME_1]", "card": "gold"}
    assert contents("I am Ann.", "Hi") == ["I am Ann.", "Hi"]


def test_numbers_in_annotations_are_masked_like_the_text():
    dialogue, _ = masked("my number is 13812345678", "ok", entities={"phone": 13812345678, "amount": 5000})
    assert dict(dialogue.messages[-1].annotations.entities) == {"phone": "[MOBILE_1]", "amount": 5000}


def test_pseudonyms_are_equal_over_the_set_and_pass_for_the_real_thing():
    masker = Masker(PiiConfig(style="pseudonym", key="k"))
    one, two = (
        masker.mask(Conversation(id=n, messages=(Message(role="user", content=f"{n} {ID} {CARD} a@b.cn 13812345678"),))) for n in "ab"
    )
    assert one.messages[0].content[2:] == two.messages[0].content[2:]
    id_card, bank_card, mail, mobile = one.messages[0].content.split()[1:]
    assert is_id_card(id_card) and is_bank_card(bank_card)
    assert mail.endswith("@example.com") and len(mobile) == 11
    other = Masker(PiiConfig(style="pseudonym", key="other")).mask(Conversation(id="c", messages=(Message(role="user", content=f"{ID}"),)))
    assert other.messages[0].content not in (ID, id_card)


def test_a_dialogue_without_personal_data_is_the_same_object():
    row = Conversation(id="x", messages=(Message(role="user", content="hello 12"),))
    assert Masker(PiiConfig()).mask(row) is row


def test_kinds_can_be_left_out():
    assert contents("13812345678 a@b.cn", "ok", kinds=["email"]) == ["13812345678 [EMAIL_1]", "ok"]
