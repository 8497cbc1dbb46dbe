"""What operations change, what they must not, and that every change can be taken back."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1ray.data.augment.augmenter import Augmenter
from r1ray.data.augment.config import (
    AugmentConfig,
    BackTranslationConfig,
    EntitiesConfig,
    LocalConfig,
    MaskedConfig,
    RewriteConfig,
    ServedConfig,
    SynonymsConfig,
    SyntaxConfig,
    TrapsConfig,
    TreesConfig,
)
from r1ray.data.augment.local import LocalWriter
from r1ray.data.augment.masked import MaskedParaphrase
from r1ray.data.augment.provenance import dump, load, undo
from r1ray.data.augment.rules import EntityPools, ReplaceEntities, ReplaceSynonyms, VarySyntax
from r1ray.data.augment.served import BackTranslation, Rewriting
from r1ray.data.augment.traps import LogicTraps
from r1ray.data.augment.trees import DialogueTrees
from r1ray.data.demo import demo_conversations
from r1ray.errors import InvalidValue, ServerUnreachable
from r1ray.model.prompts import with_passages
from r1ray.types import Annotations, Conversation, Message, Passage


def answered(intent, reply, entities):
    line = json.dumps({"intent": intent, "entities": entities}, ensure_ascii=False)
    return Message(role="assistant", content=f"{line}\n{reply}", annotations=Annotations(intent=intent, entities=entities))


def dialogue(question, reply="Done.", *, name="x", entities=None):
    answer = Message(role="assistant", content=reply) if entities is None else answered("i", reply, entities)
    return Conversation(id=name, messages=(Message(role="user", content=question), answer))


def pools(**values):
    made = EntityPools()
    for name, choices in values.items():
        for language_question in ("my question", "我的问题"):
            for choice in choices:
                made.add(dialogue(language_question, entities={name: choice}))
    return made


def check(row, made):
    """Undone it is the row again, also through the text of the column."""
    assert made.origin == row.id and made.conversation.id.startswith(f"{row.id}#")
    assert undo(made.conversation, made.origin, load(dump(made.operations))) == row
    return made.conversation


def test_synonyms_replace_words_but_no_annotated_value():
    row = dialogue("I lost my lost card, please help", entities={"card": "lost card"})
    (made,) = ReplaceSynonyms(SynonymsConfig(probability=1.0), 0).apply([row])
    text = check(row, made).messages[0].content
    assert text == "I misplaced my lost card, kindly assist"


def test_chinese_synonyms_hold_the_seeds_example():
    row = dialogue("利率上调会影响我的房贷吗")
    (made,) = ReplaceSynonyms(SynonymsConfig(probability=1.0), 0).apply([row])
    assert check(row, made).messages[0].content in ("基准利率提升会影响我的房贷吗", "贷款利率增加会影响我的房贷吗")


def test_a_lexicon_of_ones_own_is_used(tmp_path):
    (tmp_path / "l.yaml").write_text("en:\n  - [foo, bar]\n")
    (made,) = ReplaceSynonyms(SynonymsConfig(probability=1.0, lexicon=tmp_path / "l.yaml"), 0).apply([dialogue("the Foo here")])
    assert made.conversation.messages[0].content == "the Bar here"
    (tmp_path / "l.yaml").write_text("en: [foo]\n")
    with pytest.raises(InvalidValue, match="at least two synonyms"):
        ReplaceSynonyms(SynonymsConfig(lexicon=tmp_path / "l.yaml"), 0)


def test_passages_stay_as_they_are():
    passage = Passage(id="p", text="You lost your card? Please help yourself.", source="s")
    for style in ("compact", "official"):
        row = dialogue(with_passages("I lost it, please help", [passage], style=style, language="en"))
        (made,) = ReplaceSynonyms(SynonymsConfig(probability=1.0), 0).apply([row])
        text = check(row, made).messages[0].content
        assert passage.text in text and text.endswith("I misplaced it, kindly assist")


def test_an_entity_changes_in_question_answer_and_annotation_alike():
    row = dialogue("I lost my gold card", "Your gold card is blocked, not the goldfish.", entities={"card": "gold"})
    (made,) = ReplaceEntities(EntitiesConfig(), 0, pools(card=["gold", "silver"])).apply([row])
    question, answer = check(row, made).messages
    assert question.content == "I lost my silver card"
    assert answer.content == '{"intent": "i", "entities": {"card": "silver"}}\nYour silver card is blocked, not the goldfish.'
    assert dict(answer.annotations.entities) == {"card": "silver"}


@pytest.mark.parametrize(
    ("question", "reply", "entities"),
    [
        ("it is gone", "Your gold card.", {"card": "gold"}),  # the customer does not name it
        ("10 days ago", "It takes 10 days. You waited 10.", {"card": 10}),  # whose 10 is it?
        ("[webpage 1 begin]gold card[webpage 1 end]\nmy gold card", "ok", {"card": "gold"}),  # the passage speaks of it
        ("[NAME_1] lost it", "ok", {"card": "[NAME_1]"}),  # a mask
    ],
)
def test_an_entity_stays_where_its_change_could_be_wrong(question, reply, entities):
    row = dialogue(question, reply, entities=entities)
    operator = ReplaceEntities(EntitiesConfig(), 0, pools(card=["gold", "silver", 10, 12, "[NAME_1]", "[NAME_2]"]))
    assert operator.apply([row]) == [None]


def test_values_come_from_rows_of_the_same_intent_or_from_the_users_file(tmp_path):
    other_intent = Conversation(id="o", messages=(Message(role="user", content="my question"), answered("other", "ok", {"card": "iron"})))
    known = pools(card=["gold", "silver"])
    known.add(other_intent)
    rows = [dialogue("my gold card", name=f"r{n}", entities={"card": "gold"}) for n in range(20)]
    drawn = {made.conversation.messages[0].content for made in ReplaceEntities(EntitiesConfig(), 0, known).apply(rows)}
    assert drawn == {"my silver card"}
    (tmp_path / "v.yaml").write_text("card: [gold, bronze]\n")
    (made,) = ReplaceEntities(EntitiesConfig(values=tmp_path / "v.yaml"), 0, known).apply(rows[:1])
    assert made.conversation.messages[0].content == "my bronze card"


@pytest.mark.parametrize(
    ("question", "forms"),
    [
        (
            "How do I reset my PIN?",
            {"What do I have to do to reset my PIN?", "Tell me how to reset my PIN.", "I want to know how to reset my PIN."},
        ),
        ("怎么修改手机号？", {"请问要怎么修改手机号？", "修改手机号该怎么操作？", "想了解一下如何修改手机号。"}),
    ],
)
def test_syntax_takes_another_form(question, forms):
    row = dialogue(question)
    (made,) = VarySyntax(SyntaxConfig(), 0).apply([row])
    text = check(row, made).messages[0].content
    assert text != question and (text in forms or question[:-1] in text or question[:-1].lower() in text.lower())


def test_two_sentences_are_left_alone():
    assert VarySyntax(SyntaxConfig(), 0).apply([dialogue("I lost it. How do I block it?")]) == [None]


def test_a_distractor_leaves_the_answer():
    row = dialogue("我的信用卡丢了", "请挂失。")
    (made,) = LogicTraps(TrapsConfig(kinds=["distractor"]), 0, EntityPools()).apply([row])
    changed = check(row, made)
    assert changed.messages[0].content.endswith("我的信用卡丢了") and changed.messages[1] == row.messages[1]


def test_a_conflict_is_answered_by_asking_and_drops_the_doubtful_entity():
    row = dialogue("Send 5000 to Ann", "Sent 5000.", entities={"amount": 5000, "to": "Ann"})
    (made,) = LogicTraps(TrapsConfig(kinds=["conflict"]), 0, pools(amount=[5000, 7000])).apply([row])
    question, answer = check(row, made).messages
    assert "7000" in question.content and "5000" in answer.content and "7000" in answer.content
    assert dict(answer.annotations.entities) == {"to": "Ann"} == json.loads(answer.content.split("\n")[0])["entities"]


def test_a_converse_adds_two_turns_and_spares_labelled_rows():
    row = dialogue("我的信用卡丢了", "请挂失。")
    operator = LogicTraps(TrapsConfig(kinds=["converse"]), 0, EntityPools())
    (made,) = operator.apply([row])
    changed = check(row, made)
    assert len(changed.messages) == 4 and changed.messages[3].content.startswith("不对")
    assert operator.apply([dialogue("I lost it", entities={"a": "b"})]) == [None]


def test_a_row_has_the_same_change_whatever_is_beside_it():
    rows = demo_conversations("train")[:40]
    operator = ReplaceSynonyms(SynonymsConfig(), 3)
    assert operator.apply(rows) == [operator.apply([row])[0] for row in rows]


TREE = """
trees:
  - name: lost
    slots: {card: [信用卡, 借记卡], days: [3, 5]}
    start: report
    nodes:
      report:
        user: ["我的{card}丢了", "{card}不见了"]
        assistant: "要挂失{card}吗？"
        intent: lost
        entities: {card: "{card}", days: "{days}"}
        next: [yes_, no_]
      yes_: {user: [要], assistant: "已挂失，{days}天内补发。"}
      no_: {user: [不用], assistant: 好的。}
"""


def test_a_tree_gives_every_path_with_drawn_values(tmp_path):
    (tmp_path / "t.yaml").write_text(TREE, encoding="utf-8")
    made = list(DialogueTrees(TreesConfig(path=tmp_path / "t.yaml", num=100), 0).made())
    assert len({tuple(m.content for m in row.conversation.messages) for row in made}) == len(made) == 8 + 4
    assert {row.operations[0].detail["path"] for row in made} == {"report yes_", "report no_"}
    first = made[0].conversation.messages[1].annotations
    assert first.intent == "lost" and first.entities["card"] in ("信用卡", "借记卡") and first.entities["days"] in (3, 5)
    assert len({row.conversation.id for row in made}) == len(made)
    with pytest.raises(ValueError, match="no row to go back to"):
        undo(made[0].conversation, "", made[0].operations)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("next: [yes_, no_]", "next: [nowhere]", "goes to nowhere"),
        ("{days}天", "{hours}天", "unknown slot"),
        ("assistant: 好的。", "next: [no_]", "no_"),
    ],
)
def test_a_broken_tree_is_named(tmp_path, old, new, message):
    (tmp_path / "t.yaml").write_text(TREE.replace(old, new), encoding="utf-8")
    with pytest.raises(InvalidValue, match=message):
        DialogueTrees(TreesConfig(path=tmp_path / "t.yaml"), 0)


class _Served(BaseHTTPRequestHandler):
    """A chat completion whose text is what `server.reply(prompt)` says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        status, text = self.server.reply(body["messages"][0]["content"])
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Served)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.config = ServedConfig(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m", retries=1)
    yield server
    server.shutdown()
    server.server_close()


def test_a_rewriting_is_taken_when_it_keeps_the_values(served):
    replies = {"send": "<think>hm</think>\n“Please wire 5000 to Ann.”", "lose": "Please wire 6000 to Ann.", "chat": "好的，我来帮您改写。"}
    served.reply = lambda prompt: (200, next(text for key, text in replies.items() if key in prompt))
    rows = [dialogue(f"{word} 5000 to Ann today", name=word, entities={"amount": 5000, "to": "Ann"}) for word in replies]
    first, second, third = Rewriting(RewriteConfig(served=served.config), 7).apply(rows)
    assert check(rows[0], first).messages[0].content == "Please wire 5000 to Ann."
    assert (second, third) == (None, None)
    path, body, _ = served.requests[0]
    assert path == "/v1/chat/completions" and (body["model"], body["seed"], body["temperature"]) == ("m", 7, 0.7)


def test_back_translation_asks_twice(served):
    served.reply = lambda prompt: (
        200,
        "Where is my card now?" if "翻译成英文" in prompt else "我的卡在哪里？" if "Chinese" in prompt else "?",
    )
    row = dialogue("Where has my card gone?")
    (made,) = BackTranslation(BackTranslationConfig(served=served.config), 0).apply([row])
    assert check(row, made).messages[0].content == "Where is my card now?"
    assert len(served.requests) == 2 and "我的卡在哪里" in served.requests[1][1]["messages"][0]["content"]


def test_a_failed_request_is_repeated_and_a_dead_server_named(served, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    config = served.config.model_copy(update={"api_key_env": "MY_KEY"})
    served.reply = lambda _: (500, "") if len(served.requests) == 1 else (200, "Where did my card go?")
    (made,) = Rewriting(RewriteConfig(served=config), 0).apply([dialogue("Where has my card gone?")])
    assert made is not None and served.requests[0][2] == "Bearer secret"
    dead = ServedConfig(base_url="http://127.0.0.1:1/v1", model="m", retries=0)
    with pytest.raises(ServerUnreachable, match="gave no chat completion for model 'm'"):
        Rewriting(RewriteConfig(served=dead), 0).apply([dialogue("Where is it?")])


def test_a_model_in_a_directory_writes_the_same_wordings_for_the_same_seed(tiny_llama):
    prompts = ["Where is my card?", "Say it again.", "The card was stolen, please block it today."]
    config = LocalConfig(model=tiny_llama, max_tokens=8, batch_size=2)
    first = LocalWriter(config).answers(prompts, 1)
    assert len(first) == 3 and any(first)
    assert LocalWriter(config).answers(prompts, 1) == first
    assert LocalWriter(config).answers(prompts, 2) != first
    greedy = config.model_copy(update={"temperature": 0.0})
    assert LocalWriter(greedy).answers(prompts, 1) == LocalWriter(greedy).answers(prompts, 2)


def test_back_translation_by_a_directory_tries_every_row_and_takes_no_nonsense(tiny_llama):
    rows = [dialogue("Where has my card gone?", name="a"), dialogue("我的卡丢了", name="b")]
    config = BackTranslationConfig(local=LocalConfig(model=tiny_llama, max_tokens=8))
    made = BackTranslation(config, 0).apply(rows)
    assert len(made) == 2
    assert all(
        check(row, one).messages[0].content != row.messages[0].content for row, one in zip(rows, made, strict=True) if one is not None
    )


def test_wordings_want_one_writer_and_a_directory_that_holds_one(served, tmp_path):
    local = LocalConfig(model=tmp_path)
    for settings in ({}, {"served": served.config, "local": local}):
        with pytest.raises(ValueError, match="set served"):
            RewriteConfig(**settings)
    with pytest.raises(InvalidValue, match="No language model in"):
        Rewriting(RewriteConfig(local=local), 0).apply([dialogue("Where is it?")])


def test_a_wording_that_changes_nothing_makes_no_row(served):
    served.reply = lambda _: (200, "where has my card gone?")
    assert Rewriting(RewriteConfig(served=served.config), 0).apply([dialogue("Where has my card gone?")]) == [None]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A masked LM with random weights over the words of the test: real code, no knowledge."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"我的卡丢了怎么办在哪里",
        "my",
        "card",
        "is",
        "gone",
        "where",
        "##s",
        "gold",
        "5000",
    ]
    (path / "vocab.txt").write_text("\n".join(dict.fromkeys(words)), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(path / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(path)
    return path


def test_a_masked_model_paraphrases_and_spares_values_and_numbers(tiny_bert):
    rows = [dialogue("where is my gold card 5000", name=f"r{n}", entities={"card": "gold"}) for n in range(10)]
    rows.append(dialogue("我的卡丢了怎么办", name="zh"))
    made = MaskedParaphrase(MaskedConfig(model=tiny_bert, probability=0.3, batch_size=4), 0).apply(rows)
    texts = [check(row, new).messages[0].content for row, new in zip(rows, made, strict=True) if new is not None]
    assert len(texts) > 6
    for text in texts[:-1]:
        words = text.split()
        assert (words[3], words[5], len(words)) == ("gold", "5000", 6)
    assert len(texts[-1]) == 8 and all("\u4e00" <= c <= "\u9fff" for c in texts[-1])


def test_a_directory_without_a_masked_model_is_refused(tmp_path):
    with pytest.raises(InvalidValue, match="No masked language model in"):
        MaskedParaphrase(MaskedConfig(model=tmp_path), 0).apply([dialogue("where is it")])


def test_shares_are_scaled_to_the_cap_and_the_cap_is_kept():
    rows = demo_conversations("train")[:200]
    config = AugmentConfig(operations=(SynonymsConfig(share=1.0), SyntaxConfig(share=1.0)), max_share=0.2)
    augmenter = Augmenter(config, seed=0, pools=EntityPools())
    assert augmenter.plan(200, 0) == 50
    made = []
    for start in range(0, 200, 50):
        for row in augmenter.augment(rows[start : start + 50]):
            augmenter.count(row)
            made.append(row)
    assert 10 < len(made) <= 50
    assert set(augmenter.made) == {"synonyms", "syntax"}
