"""Raw rows out of files: what a file is, its encoding, and rows that the file itself breaks."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.data.files import data_files, rows_of
from r1ray.errors import NothingToTrain, UnknownFormat, WrongEncoding

ROWS = [{"text": "你好，卡", "label": "a"}, {"text": 'say "hi"\nnow', "label": "b"}]


def values(path):
    return [dict(raw.values) for raw in rows_of(path)]


def save(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_is_known_by_its_content(tmp_path, name, encoding):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert values(save(tmp_path / name, lines, encoding)) == ROWS
    assert values(save(tmp_path / name, json.dumps(ROWS, indent=2), encoding)) == ROWS


def test_an_object_with_data_gives_its_rows_and_another_is_one_row(tmp_path):
    assert values(save(tmp_path / "x.json", json.dumps({"version": 1, "data": ROWS}))) == ROWS
    assert values(save(tmp_path / "x.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_with_quoted_line_breaks_is_read(tmp_path, encoding, end):
    text = f'text,label{end}"你好，卡",a{end}{end}"say ""hi""\nnow",b{end}'
    path = save(tmp_path / "x.csv", text, encoding)
    assert values(path) == ROWS
    assert [raw.row for raw in rows_of(path)] == [2, 4]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_recognised(tmp_path, delimiter):
    path = save(tmp_path / "x.csv", f"text{delimiter}label\na, b{delimiter}c\n")
    assert values(path) == [{"text": "a, b", "label": "c"}]


def test_a_field_too_many_is_a_problem_of_its_row(tmp_path):
    path = save(tmp_path / "x.csv", "text,label\na,b\nhello, you,c\nd,e\n")
    assert [raw.problem for raw in rows_of(path)] == [
        None,
        "3 fields where the header has 2; quote a field that holds the delimiter",
        None,
    ]


def test_an_unclosed_quote_reports_every_line_it_swallows(tmp_path):
    path = save(tmp_path / "x.csv", 'text,label\na,b\n"open,c\nd,e\nf,g\n')
    rows = list(rows_of(path))
    assert [raw.row for raw in rows] == [2, 3, 4, 5]
    assert [raw.problem for raw in rows] == [
        None,
        "no CSV: unexpected end of data",
        "inside a quote that row 3 opens and nothing closes",
        "inside a quote that row 3 opens and nothing closes",
    ]


def test_a_stray_quote_costs_its_own_row(tmp_path):
    path = save(tmp_path / "x.csv", 'text,label\n"a"b,c\nd,e\n')
    assert [raw.problem is None for raw in rows_of(path)] == [False, True]


def test_parquet_is_read_whatever_its_name(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.bin")
    assert values(tmp_path / "x.bin") == ROWS


def test_gbk_is_named(tmp_path):
    path = save(tmp_path / "x.csv", "text,label\n我的卡丢了，怎么办？,card_lost\n", "gbk")
    with pytest.raises(WrongEncoding) as caught:
        list(rows_of(path))
    assert str(caught.value) == (
        f"{path} is not UTF-8 (byte 0xce in line 2); it reads as GBK. Convert it: iconv -f GB18030 -t UTF-8 x.csv > utf8-x.csv"
    )


def test_gbk_in_one_json_array_is_named(tmp_path):
    path = save(tmp_path / "x.json", '[{"text": "我的卡丢了"}]', "gbk")
    with pytest.raises(WrongEncoding, match=r"byte 11\); it reads as GBK"):
        list(rows_of(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text,label\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"text,label\ncaf\xe9,b\n", "its encoding is unknown. Export it as UTF-8"),
        (b"text,label\n\xff\xff\xff,b\n", "its encoding is unknown. Export it as UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path, data, message):
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(WrongEncoding, match=message):
        list(rows_of(tmp_path / "x.csv"))


@pytest.mark.parametrize("data", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_nothing_to_train(tmp_path, data):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(NothingToTrain, match="is empty"):
        rows_of(tmp_path / "x.jsonl")


def test_an_empty_directory_is_nothing_to_train(tmp_path):
    with pytest.raises(NothingToTrain, match=r"holds no \.json"):
        data_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.pdf", b"%PDF-1.7", "is no JSON, JSON Lines, CSV or Parquet"),
        ("x.json", b'[{"a": 1}, {"a"', "is no complete JSON"),
        ("x.parquet", b"PAR1 cut off", "is a broken Parquet file"),
        ("x.csv", b"text,label,text\na,b,c\n", "names the column 'text' twice"),
    ],
)
def test_a_file_broken_as_a_whole_is_an_unknown_format(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnknownFormat, match=message):
        list(rows_of(tmp_path / name))


def test_json_lines_are_streamed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' * 3 + "\xff", encoding="latin-1")
    rows = rows_of(path)
    assert next(rows).values == {"a": 1}


@pytest.mark.parametrize(
    ("name", "head"), [("faq.xlsx", b"PK\x03\x04\x14\x00"), ("faq.csv", b"PK\x03\x04\x14\x00"), ("old.xls", b"\xd0\xcf\x11\xe0")]
)
def test_an_excel_workbook_is_named_with_what_to_do(tmp_path, name, head):
    (tmp_path / name).write_bytes(head + bytes(100))
    with pytest.raises(UnknownFormat, match=r"Excel workbook or an archive\. Save its sheet as 'CSV UTF-8'"):
        list(rows_of(tmp_path / name))


def test_the_command_that_converts_can_be_pasted(tmp_path):
    path = save(tmp_path / "客户 问答.csv", "text,label\n我的卡丢了，怎么办？,card_lost\n", "gbk")
    with pytest.raises(WrongEncoding, match=r"iconv -f GB18030 -t UTF-8 '客户 问答.csv' > 'utf8-客户 问答.csv'"):
        list(rows_of(path))
