"""Reading pairs of answers: the formats, what is refused and why, ids, the split."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.data.config import DataConfig
from r1ray.data.preferences import hold_out_pairs, read_preferences
from r1ray.data.read import read_conversations
from r1ray.errors import MissingColumn, NothingToTrain, TooManyBadRows, UnknownFormat
from r1ray.types import Message, Preference

PLAIN = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
SAID = [{"role": "user", "content": "1 + 1?"}]


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, **config):
    return read_preferences(DataConfig(path=path, **{"max_bad_share": 1.0, **config}))


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (PLAIN, "pairs"),
        ({"prompt": SAID, "chosen": [turn("assistant", "2")], "rejected": [turn("assistant", "3")]}, "pairs"),
        ({"chosen": [*SAID, turn("assistant", "2")], "rejected": [*SAID, turn("assistant", "3")]}, "pairs"),
        ({"prompt": "1 + 1?", "chosen": [*SAID, turn("assistant", "2")], "rejected": [*SAID, turn("assistant", "3")]}, "pairs"),
        (
            {
                "conversations": [{"from": "human", "value": "1 + 1?"}],
                "chosen": {"from": "gpt", "value": "2"},
                "rejected": {"from": "gpt", "value": "3"},
            },
            "sharegpt_pairs",
        ),
        ({"instruction": "1 + 1?", "input": "", "chosen": "2", "rejected": "3"}, "alpaca_pairs"),
        ({"instruction": "1 + 1?", "input": "", "output": ["2", "3"]}, "alpaca_pairs"),
    ],
)
def test_every_common_format_gives_the_same_pair_and_hash(tmp_path, row, format) -> None:
    loaded = read(write(tmp_path / "rows.jsonl", row))
    (pair,) = loaded.pairs
    assert loaded.formats == (format,)
    assert pair.prompt == (Message(role="user", content="1 + 1?"),)
    assert (pair.chosen, pair.rejected) == (Message(role="assistant", content="2"), Message(role="assistant", content="3"))
    assert loaded.data_hash == read(write(tmp_path / "plain.jsonl", PLAIN)).data_hash
    assert read(tmp_path / "rows.jsonl", format=format).pairs == loaded.pairs


def test_the_file_type_does_not_matter(tmp_path) -> None:
    hashes = {read(write(tmp_path / "rows.jsonl", PLAIN)).data_hash}
    (tmp_path / "rows.json").write_text(json.dumps([PLAIN]))
    pq.write_table(pa.table({key: [value] for key, value in PLAIN.items()}), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PLAIN)
        writer.writeheader()
        writer.writerow(PLAIN | {"chosen": json.dumps([turn("assistant", "2")])})
    hashes |= {read(tmp_path / f"rows.{end}").data_hash for end in ("json", "parquet", "csv")}
    assert len(hashes) == 1


def test_an_answer_that_is_json_stays_a_text(tmp_path) -> None:
    (pair,) = read(write(tmp_path / "rows.jsonl", PLAIN | {"chosen": '[{"name": "call"}]'})).pairs
    assert pair.chosen.content == '[{"name": "call"}]'


def test_system_messages_history_and_reasoning_are_kept(tmp_path) -> None:
    row = {"instruction": "And 3?", "history": [["1 + 1?", "2"]], "system": "Count.", "output": ["<think>one more</think>3", "4"]}
    (pair,) = read(write(tmp_path / "rows.jsonl", row)).pairs
    assert [m.role for m in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.chosen.reasoning, pair.chosen.content) == ("one more", "3")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "  "}, "chosen with empty text"),
        ({"rejected": None}, "rejected without text"),
        ({"rejected": []}, "rejected is empty"),
        ({"rejected": "2 "}, "chosen and rejected are the same"),
        ({"chosen": 2}, "chosen is an int, not text"),
        ({"prompt": None}, "no prompt: fill the column prompt"),
        ({"prompt": [*SAID, turn("assistant", "2")]}, "the prompt ends with an assistant turn"),
        ({"prompt": [turn("assistant", "Hello"), *SAID]}, "turn 1 is assistant at the start"),
        ({"chosen": [turn("user", "2")]}, "chosen ends with a user turn"),
        ({"chosen": [*SAID, turn("assistant", "2")]}, "do not begin with the same turns"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(tmp_path, change, reason) -> None:
    loaded = read(write(tmp_path / "rows.jsonl", PLAIN, PLAIN | change))
    assert len(loaded.pairs) == 1 and loaded.num_rows == 2
    (reject,) = loaded.rejects
    assert reject.row == 2
    assert reason in reject.reason


def test_repair_drops_a_greeting(tmp_path) -> None:
    row = PLAIN | {"prompt": [turn("assistant", "Hello"), *SAID]}
    (pair,) = read(write(tmp_path / "rows.jsonl", row), role_order="repair").pairs
    assert pair.prompt == (Message(role="user", content="1 + 1?"),)


def test_too_many_bad_rows_end_the_reading_and_are_listed(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", PLAIN, PLAIN | {"rejected": "2"})
    with pytest.raises(TooManyBadRows, match="1 of 2 rows"):
        read(path, max_bad_share=0.1, rejects=tmp_path / "rejects.jsonl")
    assert "the same" in (tmp_path / "rejects.jsonl").read_text()
    with pytest.raises(NothingToTrain):
        read(write(tmp_path / "all.jsonl", PLAIN | {"rejected": "2"}))


def test_a_file_without_a_worse_answer_is_refused_by_name(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "1 + 1?", "chosen": "2"})
    with pytest.raises(MissingColumn, match=r"prompt, chosen, which are not those of pairs.*pairs: chosen, rejected"):
        read(path)
    with pytest.raises(MissingColumn, match="alpaca_pairs: instruction"):
        read(path, format="alpaca_pairs")
    with pytest.raises(UnknownFormat, match=r"data\.format=messages holds dialogues"):
        read(path, format="messages")


def test_a_file_of_pairs_is_no_file_of_dialogues(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", PLAIN)
    for config in ({}, {"format": "pairs"}):
        with pytest.raises(UnknownFormat, match=r"train\.objective=dpo"):
            read_conversations(DataConfig(path=path, **config))


def test_equal_pairs_get_different_ids_and_limit_draws_a_sample(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", *[PLAIN] * 2, *[PLAIN | {"prompt": f"{i} + 1?"} for i in range(8)])
    names = [pair.id for pair in read(path).pairs]
    assert len(set(names)) == 10 and names[1] == f"{names[0]}#2"
    assert [pair.id for pair in read(path, limit=4).pairs] == [pair.id for pair in read(path, limit=4).pairs]
    assert len(read(path, limit=4).pairs) == 4


def made(prompt, answer) -> Preference:
    said = Message(role="user", content=prompt)
    return Preference(id=f"{prompt}{answer}", prompt=(said,), chosen=Message(role="assistant", content=answer), rejected=said)


def test_pairs_of_one_prompt_stay_on_one_side_in_any_order() -> None:
    pairs = [made(f"q{i % 10}", str(i)) for i in range(40)]
    train, held = hold_out_pairs(pairs, 0.2, seed=1)
    assert len(held) == 8 and len(train) == 32
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert {p.id for p in hold_out_pairs(pairs[::-1], 0.2, seed=1)[1]} == {p.id for p in held}
    assert {p.id for p in hold_out_pairs(pairs, 0.2, seed=2)[1]} != {p.id for p in held}


def test_pairs_made_from_one_stay_with_it_through_any_chain() -> None:
    pairs = [
        replace(made(f"q{i}{word}", "a"), id=f"{i}#{word}" if word else str(i)) for i in range(30) for word in ("", "rewrite", "masked")
    ]
    pairs += [replace(made("q0rewrite", "b"), id="other"), replace(made("far", "c"), id="other#masked")]
    train, held = hold_out_pairs(pairs, 0.3, seed=1)
    assert (len(train) + len(held), len(held)) in {(92, 27), (92, 29)}, "9 of 30 groups"
    assert not {p.id.partition("#")[0] for p in train} & {p.id.partition("#")[0] for p in held}
    assert len({p in held for p in pairs if p.id in ("0", "0#rewrite", "other", "other#masked")}) == 1
    assert {p.id for p in hold_out_pairs(pairs[::-1], 0.3, seed=1)[1]} == {p.id for p in held}


@pytest.mark.parametrize(("num_pairs", "share", "num_held"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (9, 0.0, 0)])
def test_both_sides_have_a_pair_where_that_is_possible(num_pairs, share, num_held) -> None:
    assert len(hold_out_pairs([made(f"q{i}", "a") for i in range(num_pairs)], share)[1]) == num_held


@pytest.mark.parametrize(("most", "num_held"), [(400, 20), (20, 20), (19, 18), (7, 6), (1, 2)])
def test_no_more_are_held_out_than_the_limit_but_one_prompt_always(most, num_held) -> None:
    pairs = [made(f"q{i % 20}", str(i)) for i in range(40)]
    train, held = hold_out_pairs(pairs, 0.5, most=most)
    assert (len(train), len(held)) == (40 - num_held, num_held)
    whole = {pair.id for pair in hold_out_pairs(pairs, 0.5)[1]}
    assert {pair.id for pair in held} <= whole, "a lower limit only takes some of them away"


def test_a_table_of_labels_is_each_label_against_another_one(tmp_path) -> None:
    labels = ("card_lost", "pin_change", "rate")
    path = write(tmp_path / "rows.jsonl", *({"text": f"question {i}", "category": labels[i % 3]} for i in range(30)))
    with pytest.raises(MissingColumn, match=r"data\.format=labelled"):
        read(path)
    loaded = read(path, format="labelled")
    words = {label.replace("_", " ") for label in labels}
    assert [pair.chosen.content for pair in loaded.pairs] == [labels[i % 3].replace("_", " ") for i in range(30)]
    assert all(pair.rejected.content in words - {pair.chosen.content} for pair in loaded.pairs)
    assert {pair.rejected.content for pair in loaded.pairs} == words
    assert loaded.pairs[4].prompt == (Message(role="user", content="question 4"),)
    assert read(path, format="labelled").pairs == loaded.pairs
    assert read(path, format="labelled", seed=1).data_hash != loaded.data_hash


def test_one_label_has_nothing_to_be_preferred_to(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "question", "label": "rate"}, {"text": "another", "label": "rate"})
    with pytest.raises(NothingToTrain, match="'rate'"):
        read(path, format="labelled")
