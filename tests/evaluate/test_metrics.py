"""Each metric against figures worked out by hand."""

import math

import pytest

from r1ray.errors import EvaluationError
from r1ray.evaluate import exact
from r1ray.evaluate.answer import normal_text, normal_value, parse_answer
from r1ray.evaluate.example import examples_of
from r1ray.evaluate.lexical import bleu, lexical, rouge_l, words
from r1ray.evaluate.scoring import check_metrics, score
from r1ray.evaluate.shares import Share, interval, quotient
from r1ray.types import Annotations, Conversation, Message


def dialogue(question, gold, intent=None):
    annotations = Annotations(intent=intent) if intent else None
    return Conversation(
        id="a", messages=(Message(role="user", content=question), Message(role="assistant", content=gold, annotations=annotations))
    )


def example(question, gold, intent=None):
    return examples_of([dialogue(question, gold, intent)])[0]


def value(name, question, gold, answer, intent=None):
    return quotient([score(example(question, gold, intent), answer)[name]])


@pytest.mark.parametrize(
    ("text", "structured", "intent", "reply"),
    [
        ('{"intent": "a", "entities": {}}\nHello', True, "a", "Hello"),
        ('\n {"intent": "a", "entities": {"x": 1}} ', True, "a", ""),
        ('{"intent": "a"}\nHello', False, None, '{"intent": "a"}\nHello'),
        ('{"intent": ["a"], "entities": {}}', False, None, '{"intent": ["a"], "entities": {}}'),
        ("[1, 2]\nHello", False, None, "[1, 2]\nHello"),
        ('{"intent": "a", "ent', False, None, '{"intent": "a", "ent'),
        ("[" * 100_000, False, None, "[" * 100_000),
        ("", False, None, ""),
    ],
)
def test_an_answer_is_taken_apart_whatever_it_is(text, structured, intent, reply):
    answer = parse_answer(text)
    assert (answer.is_structured, answer.intent, answer.reply) == (structured, intent, reply)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Card  Arrival", "card_arrival"),
        ("ＡＴＭ限额，多少？", "atm限额多少"),
        ("我的 信用卡\n丢了。", "我的信用卡丢了"),
        ("why?!", "Why"),
    ],
)
def test_equal_words_compare_as_equal(one, other):
    assert normal_text(one) == normal_text(other)


def test_different_words_stay_different():
    assert normal_text("card arrival") != normal_text("card lost")
    assert normal_text("cardarrival") != normal_text("card arrival")


@pytest.mark.parametrize(("one", "other"), [(500, "500"), (500.0, "500"), ("５００", 500), ("Credit Card", "credit card"), (True, "true")])
def test_entity_values_compare_across_types(one, other):
    assert normal_value(one) == normal_value(other)


GOLD = '{"intent": "card_lost", "entities": {"card": "credit", "city": "上海"}}\nBlock it in the app.'


def test_intent_is_exact():
    assert value("intent_accuracy", "q", GOLD, '{"intent": "card_lost", "entities": {}}\nx') == 1
    assert value("intent_accuracy", "q", GOLD, '{"intent": "card lost", "entities": {}}\nx') == 0
    assert value("intent_accuracy", "q", GOLD, "card_lost") == 0


def test_entity_f1_is_micro_over_pairs():
    answer = '{"intent": "x", "entities": {"card": "credit", "city": "北京", "day": "1"}}'
    assert value("entity_f1", "q", GOLD, answer) == pytest.approx(2 * 1 / (3 + 2))
    shares = [exact.entities(parse_answer(a), parse_answer(GOLD)) for a in (answer, GOLD)]
    assert quotient(shares) == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))  # TP 1 + 2, FP 2, FN 1


def test_no_entities_on_either_side_count_for_nothing():
    nothing = parse_answer('{"intent": "x", "entities": {}}')
    assert quotient([exact.entities(nothing, nothing)]) is None


def test_format_counts_the_structured_line():
    assert value("format_ok", "q", GOLD, GOLD) == 1
    assert value("format_ok", "q", GOLD, "Block it in the app.") == 0


def test_rouge_compares_the_reply_only():
    assert value("rouge_l", "q", GOLD, '{"intent": "x", "entities": {}}\nBlock it in the app.') == 1


def test_rouge_l_by_hand():
    # longest common subsequence: the cat on mat = 4; precision 4/5, recall 4/6
    assert rouge_l("the cat lay on mat", "the cat sat on the mat").numerator == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_rouge_sees_chinese_words():
    assert words("请冻结信用卡。") == ["请", "冻结", "信用卡"]
    assert rouge_l("请冻结信用卡", "请挂失信用卡").numerator == pytest.approx(2 / 3)
    assert rouge_l("", "请挂失信用卡").numerator == 0


def test_labelled_data_is_matched_by_its_words():
    scores = score(example("Where is my card?", "card arrival", intent="card_arrival"), "Card_arrival.")
    assert scores == {"exact_match": Share(1, 1)}


def test_plain_text_is_compared_whole():
    assert set(score(example("Hi", "Hello, how are you?"), "Hello")) == {"rouge_1", "rouge_2", "rouge_l", "bleu"}


QUESTION = "[webpage 1 begin]A[webpage 1 end]\n[webpage 2 begin]B[webpage 2 end]\n利率是多少？"


@pytest.mark.parametrize(("reply", "right"), [("3%[citation:2]", 1), ("3%[citation:3]", 0), ("3%", 0), ("3%[citation:9][citation:1]", 1)])
def test_a_citation_must_exist(reply, right):
    gold = '{"intent": "rate", "entities": {}}\n3%[citation:1]'
    assert value("citation_rate", QUESTION, gold, f'{{"intent": "rate", "entities": {{}}}}\n{reply}') == right


def test_the_language_is_that_of_the_question_not_of_its_passages():
    assert example(QUESTION, "x").language == "zh"
    assert example("what is the rate?", "x").language == "en"


def test_an_example_is_the_last_assistant_turn():
    turns = [Message(role=r, content=c) for r, c in [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")]]
    found = examples_of([Conversation(id="a", messages=tuple(turns))])[0]
    assert ([m.content for m in found.prompt], found.gold.content) == (["1", "2", "3"], "4")


@pytest.mark.parametrize("roles", [("user",), ("assistant",), ("user", "user")])
def test_dialogues_that_cannot_be_scored_are_named(roles):
    conversation = Conversation(id="row7", messages=tuple(Message(role=r, content="x") for r in roles), source="f.json:7")
    with pytest.raises(EvaluationError, match=r"row7 \(f.json:7\)"):
        examples_of([conversation])
    with pytest.raises(EvaluationError, match="no dialogue"):
        examples_of([])


def test_the_interval_holds_the_value_and_narrows_with_more_examples():
    few = [Share(float(i % 2), 1.0) for i in range(20)]
    low, high = interval(few, num=500, seed=0)
    assert low < 0.5 < high
    more_low, more_high = interval(few * 20, num=500, seed=0)
    assert more_high - more_low < (high - low) / 3
    assert interval(few, num=500, seed=0) == (low, high)


def test_perplexity_is_the_exponential_of_the_mean():
    shares = [Share(math.log(4) * 3, 3), Share(0.0, 3)]
    assert quotient(shares, exponential=True) == pytest.approx(2)
    assert quotient([Share(1e9, 1)], exponential=True) > 1e300


def test_bleu_of_one_answer_is_nltks():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    pairs = [
        ("the cat lay on the mat today", "the cat sat on the mat"),
        ("请您先冻结信用卡，然后联系客服补办新卡", "请先挂失信用卡，再联系客服补办一张新卡"),
        ("a b c d e f", "a b c d e f"),
        ("one two three four", "one three two four five six seven"),
    ]
    for answer, gold in pairs:
        theirs = sentence_bleu([words(gold)], words(answer), smoothing_function=SmoothingFunction().method2)
        assert bleu(answer, gold).numerator == pytest.approx(theirs), answer


def test_bleu_of_equal_texts_is_one_however_short_and_of_strangers_zero():
    assert bleu("Sure.", "sure").numerator == bleu("免年费", "免年费。").numerator == 1
    assert bleu("", "sure").numerator == bleu("other words", "sure").numerator == 0


def test_rouge_of_words_pairs_and_the_subsequence():
    found = lexical("the cat lay on the mat", "the cat sat on the mat")
    assert {name: round(share.numerator, 3) for name, share in found.items() if name != "bleu"} == {
        "rouge_1": 0.833,
        "rouge_2": 0.6,
        "rouge_l": 0.833,
    }


def test_metrics_that_the_set_does_not_allow_are_named_before_a_model_is_loaded():
    dialogues = [dialogue("Fees?", "They are waived in the first year.")]
    assert check_metrics(["rouge_l", "perplexity"], dialogues, where="metrics", of="faq.csv") == []
    assert check_metrics(["rouge_l", "exact_match"], dialogues, where="metrics", of="faq.csv") == ["exact_match"]
    known = "allow bleu, perplexity, rouge_1, rouge_2, rouge_l"
    with pytest.raises(EvaluationError, match=f"quality names exact_match; the gold answers of faq.csv {known}"):
        check_metrics(["exact_match"], dialogues, where="quality", of="faq.csv")
