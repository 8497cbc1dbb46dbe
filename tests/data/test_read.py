"""Reading a set: the six formats, the report on bad rows, ids, sampling and the hash."""

import csv
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.data.config import DataConfig
from r1ray.data.read import read_conversations
from r1ray.errors import InvalidValue, MissingColumn, NothingToTrain, TooManyBadRows, UnknownFormat
from r1ray.types import Annotations, Message

SEED_004 = {
    "conversation_id": "CS20230801_001",
    "utterances": [
        {"role": "user", "text": "如何申请信用卡分期？"},
        {
            "role": "assistant",
            "text": "分期申请需满足...",
            "annotations": {"intent": "credit_card_installment", "entities": {"card_type": "platinum", "amount": 5000}},
        },
    ],
}
ANSWERED_BY_HAND = [
    {"role": "user", "text": "Where are you?"},
    {"role": "assistant", "text": "In Wuhan.", "annotations": {"intent": None, "entities": {"city": "Wuhan"}}},
]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dialogue(question="hello", answer="hi", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def read(path, **config):
    return read_conversations(DataConfig(path=path, **{"max_bad_share": 1.0, **config}))


def only(path, **config):
    (conversation,) = read(path, **config).conversations
    return conversation


def test_the_seeds_example_is_read_as_written(tmp_path):
    path = tmp_path / "seed.json"
    path.write_text(json.dumps(SEED_004), encoding="utf-8")
    conversation = only(path)
    assert conversation.id == "CS20230801_001"
    assert conversation.source == f"{path}:1"
    assert conversation.messages[0] == Message(role="user", content="如何申请信用卡分期？")
    assert conversation.messages[1].annotations == Annotations(
        intent="credit_card_installment", entities={"card_type": "platinum", "amount": 5000}
    )


def test_messages_with_content_parts_and_reasoning_are_read(tmp_path):
    row = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
            {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        ]
    }
    messages = only(write(tmp_path / "m.jsonl", [row])).messages
    assert [m.role for m in messages] == ["system", "user", "assistant"]
    assert messages[1].content == "1 + 1?"
    assert messages[2] == Message(role="assistant", content="2", reasoning="one and one")


@pytest.mark.parametrize("text", ["<think>\nwhy\n</think>\n\nbecause", "why\n</think>\n\nbecause"])
def test_think_tags_in_assistant_text_become_reasoning(tmp_path, text):
    answer = only(write(tmp_path / "m.jsonl", [dialogue(answer=text)])).messages[1]
    assert (answer.reasoning, answer.content) == ("why", "because")


def test_think_tags_in_user_text_stay(tmp_path):
    question = only(write(tmp_path / "m.jsonl", [dialogue(question="what is </think>?")])).messages[0]
    assert (question.reasoning, question.content) == (None, "what is </think>?")


def test_alpaca_with_input_history_and_system_is_read(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be short.", "history": [["hello", "hi"]]}
    messages = only(write(tmp_path / "a.jsonl", [row])).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be short."),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]


def test_sharegpt_is_read(tmp_path):
    row = {"id": "x", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
    conversation = only(write(tmp_path / "s.jsonl", [row]))
    assert conversation.id == "x"
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "hello"), ("assistant", "hi")]


@pytest.mark.parametrize("label_column", ["label", "category"])
def test_a_label_becomes_its_words(tmp_path, label_column):
    path = tmp_path / "l.csv"
    path.write_text(f'text,{label_column}\n"Where, please, is my card?",card_arrival\n', encoding="utf-8")
    user, assistant = only(path).messages
    assert user.content == "Where, please, is my card?"
    assert assistant == Message(role="assistant", content="card arrival", annotations=Annotations(intent="card_arrival"))


def test_label_columns_can_be_named(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("question;topic\nwhere is it?;card_arrival\n", encoding="utf-8")
    assert only(path, text_column="question", label_column="topic").messages[1].content == "card arrival"


def test_an_unknown_label_names_the_nearest(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("text,label\nwhere is it?,card_arival\nit is gone,card_lost\n", encoding="utf-8")
    loaded = read(path, labels=("card_arrival", "card_lost"))
    assert len(loaded.conversations) == 1
    assert [(r.row, r.reason) for r in loaded.rejects] == [
        (2, "unknown label 'card_arival'; the nearest of the 2 allowed is 'card_arrival'")
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (dialogue(question=" "), "user turn with empty text"),
        (dialogue(answer=None), "assistant turn without text"),
        (dialogue(answer=7), "assistant turn is an int, not text"),
        (dialogue(answer="half \ud83d"), "assistant turn holds half a surrogate pair at character 5"),
        (dialogue(answer="<think>only thought</think>"), "assistant turn with nothing after its reasoning"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ({"messages": ["hello"]}, "turn 1 is a str, not an object"),
        ({"other": 1}, "messages is missing, not a list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'; known are system, developer, user, "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content part of type 'image_url'; only text parts"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "an assistant turn holds only tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "annotations": {"entities": {"a": [1]}}}]}, "entity a is a list; give text"),
        ({"messages": [{"role": "user", "content": "x", "annotations": {"entities": {"a": float("nan")}}}]}, "entity a is nan, no number"),
        ([1, 2], "a JSON list, not an object"),
    ],
)
def test_a_bad_row_is_reported_with_file_row_and_reason(tmp_path, row, reason):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (dialogue("first"), row, dialogue("last"))), encoding="utf-8")
    loaded = read(path)
    assert [c.messages[0].content for c in loaded.conversations] == ["first", "last"]
    (reject,) = loaded.rejects
    assert (reject.file, reject.row) == (str(path), 2)
    assert reject.reason.startswith(reason)


def test_half_a_json_line_costs_one_row(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(dialogue()) + '\n\n{"messages": [{"role":\n' + json.dumps(dialogue("b")), encoding="utf-8")
    loaded = read(path)
    assert (len(loaded.conversations), loaded.num_rows) == (2, 3)
    assert [(r.row, r.reason.split(":")[0]) for r in loaded.rejects] == [(3, "no JSON")]


def test_too_many_bad_rows_fail_and_are_listed_in_the_report(tmp_path):
    path = write(tmp_path / "m.jsonl", [dialogue(str(i)) for i in range(97)] + [dialogue(question="")] * 3)
    report = tmp_path / "out" / "rejects.jsonl"
    with pytest.raises(TooManyBadRows) as caught:
        read(path, max_bad_share=0.02, rejects=report)
    assert str(caught.value).startswith("3 of 100 rows are invalid, more than data.max_bad_share=0.02 allows.")
    assert f"{path}:98: user turn with empty text" in str(caught.value)
    assert str(report) in str(caught.value)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"file": str(path), "row": row, "reason": "user turn with empty text"} for row in (98, 99, 100)]


def test_few_bad_rows_are_logged_and_left_out(tmp_path, caplog):
    path = write(tmp_path / "m.jsonl", [dialogue(str(i)) for i in range(99)] + [dialogue(question="")])
    with caplog.at_level(logging.WARNING):
        loaded = read(path, max_bad_share=0.01)
    assert (len(loaded.conversations), len(loaded.rejects)) == (99, 1)
    assert f"1 of 100 rows left out as invalid, the first: {path}:100: user turn with empty text" in caplog.text


def test_a_missing_column_names_the_found_ones_and_the_keys(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("question,topic\na,b\n", encoding="utf-8")
    with pytest.raises(MissingColumn) as caught:
        read(path)
    assert f"{path} has the columns question, topic, which fit no format" in str(caught.value)
    assert "set data.text_column and data.label_column" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "labelled"}, "has no column text, label or category for format labelled; it has question, topic."),
        ({"format": "labelled", "text_column": "question"}, "has no column label or category for format labelled"),
        ({"format": "labelled", "text_column": "question", "label_column": "kind"}, "has no column kind for format labelled"),
        ({"format": "alpaca"}, "has no column instruction, output for format alpaca"),
    ],
)
def test_a_format_given_by_hand_names_its_missing_columns(tmp_path, config, message):
    path = tmp_path / "l.csv"
    path.write_text("question,topic\na,b\n", encoding="utf-8")
    with pytest.raises(MissingColumn, match="Set data") as caught:
        read(path, **config)
    assert message in str(caught.value)


def test_no_valid_row_is_nothing_to_train(tmp_path):
    path = write(tmp_path / "m.jsonl", [dialogue(question="")])
    with pytest.raises(NothingToTrain, match="holds no valid row"):
        read(path)


def test_unreadable_first_rows_are_an_unknown_format(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("hello\nworld\n", encoding="utf-8")
    with pytest.raises(UnknownFormat, match="its first 2 rows cannot be read"):
        read(path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(InvalidValue, match=r"Set data\.path"):
        read(tmp_path / "absent.jsonl")


def test_a_directory_is_read_in_name_order(tmp_path):
    write(tmp_path / "b.jsonl", [dialogue("second")])
    write(tmp_path / "a.jsonl", [dialogue("first")])
    (tmp_path / "notes.md").write_text("not data", encoding="utf-8")
    loaded = read(tmp_path)
    assert [c.messages[0].content for c in loaded.conversations] == ["first", "second"]


def test_a_repeated_id_is_reported_with_its_first_place(tmp_path):
    path = write(tmp_path / "m.jsonl", [dialogue("a", id="x"), dialogue("b", id="x")])
    assert [(r.row, r.reason) for r in read(path).rejects] == [(2, f"conversation_id 'x' was already used at {path}:1")]


def test_equal_rows_without_ids_are_numbered(tmp_path):
    first, second, other = (c.id for c in read(write(tmp_path / "m.jsonl", [dialogue(), dialogue(), dialogue("b")])).conversations)
    assert second == f"{first}#2"
    assert other != first


def test_the_hash_depends_on_content_alone(tmp_path):
    rows = [dialogue("a", "b", id="1"), dialogue("你好", "您好", id="2")]
    alpaca = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "你好", "input": "", "output": "您好"}]
    (tmp_path / "array.json").write_text(json.dumps(alpaca, indent=1), encoding="utf-8")
    hashes = {read(write(tmp_path / "m.jsonl", rows)).data_hash, read(tmp_path / "array.json").data_hash}
    assert len(hashes) == 1
    assert read(write(tmp_path / "m.jsonl", rows[:1])).data_hash not in hashes
    assert read(write(tmp_path / "m.jsonl", rows[::-1])).data_hash not in hashes


def test_a_limit_samples_the_whole_file_by_seed_and_keeps_the_order(tmp_path):
    path = write(tmp_path / "m.jsonl", [dialogue(str(i)) for i in range(200)])
    numbers = [int(c.messages[0].content) for c in read(path, limit=20).conversations]
    assert len(numbers) == 20
    assert numbers == sorted(numbers)
    assert max(numbers) > 100 > min(numbers)
    assert numbers == [int(c.messages[0].content) for c in read(path, limit=20).conversations]
    assert numbers != [int(c.messages[0].content) for c in read(path, limit=20, seed=1).conversations]


@pytest.mark.shared
def test_banking77_is_read_completely():
    found = (parent / "shared" / "data" / "banking77_train.csv" for parent in Path(__file__).resolve().parents)
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        pytest.skip("no shared/data beside the checkout")
    loaded = read(path, max_bad_share=0.0)
    assert (loaded.num_rows, len(loaded.conversations)) == (10003, 10003)
    assert len({c.messages[1].annotations.intent for c in loaded.conversations}) == 77


def test_entities_in_foreign_parquet_lose_their_nulls_only(tmp_path):
    rows = [SEED_004, {"conversation_id": "2", "utterances": ANSWERED_BY_HAND}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = read(tmp_path / "x.parquet").conversations
    assert first.messages[1].annotations.entities == {"card_type": "platinum", "amount": 5000}
    assert second.messages[1].annotations.entities == {"city": "Wuhan"}


def test_dialogues_in_csv_cells_are_read(tmp_path):
    path = tmp_path / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "messages"], ["7", json.dumps(dialogue("你好", "您好")["messages"], ensure_ascii=False)]])
    assert (only(path).id, only(path).messages[1].content) == ("7", "您好")


@pytest.mark.parametrize(
    ("header", "config"),
    [
        ("Question,Answer", {}),
        ("编号,问题,答案", {}),
        ("prompt,completion", {}),
        ("客户说,坐席答", {"question_column": "客户说", "answer_column": "坐席答"}),
        ("客户说,坐席答", {"format": "faq", "question_column": "客户说", "answer_column": "坐席答"}),
    ],
)
def test_a_spreadsheet_of_questions_and_answers_is_read(tmp_path, header, config):
    path = tmp_path / "faq.csv"
    first = "1," if header.startswith("编号") else ""
    path.write_text(f'\ufeff{header}\r\n{first}年费多少？,"免年费。\n详见官网"\r\n', encoding="utf-8")
    loaded = read(path, **config)
    assert loaded.formats == ("faq",)
    assert [(m.role, m.content) for m in loaded.conversations[0].messages] == [("user", "年费多少？"), ("assistant", "免年费。\n详见官网")]


def test_a_question_without_an_answer_is_a_bad_row(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text("question,answer\nfee?,none\nlimit?,\n", encoding="utf-8")
    loaded = read(path)
    assert [reject.reason for reject in loaded.rejects] == ["assistant turn with empty text"]
    assert len(loaded.conversations) == 1


def test_unknown_columns_name_the_keys_for_questions_and_answers(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text("客户说,坐席答\n年费？,免。\n", encoding="utf-8")
    with pytest.raises(MissingColumn, match=r"data\.question_column and data\.answer_column"):
        read(path)
    with pytest.raises(MissingColumn, match="no column 坐席说 for format faq; it has 客户说, 坐席答"):
        read(path, format="faq", question_column="客户说", answer_column="坐席说")


def test_a_missing_file_names_both_places_that_were_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    with pytest.raises(InvalidValue, match=f"No data at faq/nope.csv, nor below R1RAY_HOME={tmp_path}. Set data.path"):
        read(Path("faq/nope.csv"))
    with pytest.raises(InvalidValue, match=f"No data at {tmp_path}/nope.csv. Set data.path"):
        read(tmp_path / "nope.csv")
