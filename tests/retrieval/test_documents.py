"""Sources become named texts; whatever cannot be read is reported."""

from pathlib import Path

import pytest

from r1ray.errors import RetrievalError
from r1ray.retrieval.documents import find, left_out, read


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "kb" / "cards").mkdir(parents=True)
    (tmp_path / "kb" / "cards" / "lost.md").write_text("# 挂失\n致电。", encoding="utf-8")
    (tmp_path / "kb" / "faq.txt").write_text("﻿a\r\nb", encoding="utf-8")
    (tmp_path / "kb" / "logo.png").write_bytes(b"\x89PNG")
    return tmp_path / "kb"


def test_a_directory_is_searched_for_documents_only(corpus):
    assert [name for name, _ in find([str(corpus)])] == ["cards/lost.md", "faq.txt"]


def test_globs_and_files_name_documents_relative_to_their_fixed_part(corpus):
    assert [name for name, _ in find([f"{corpus}/**/*.md"])] == ["cards/lost.md"]
    assert [name for name, _ in find([str(corpus / "faq.txt")])] == ["faq.txt"]


def test_a_file_named_by_two_sources_is_read_once(corpus):
    assert len(find([str(corpus), str(corpus / "faq.txt")])) == 2


def test_same_names_of_two_directories_are_told_apart(corpus):
    other = corpus.parent / "other"
    other.mkdir()
    (other / "faq.txt").write_text("c")
    assert [name for name, _ in find([str(corpus), str(other)])] == ["cards/lost.md", "kb/faq.txt", "other/faq.txt"]


def test_a_source_without_documents_is_an_error(corpus):
    with pytest.raises(RetrievalError, match="holds no"):
        find([f"{corpus}/*.rst"])
    for source in (str(corpus / "nothing"), str(corpus / "logo.png") + "/x"):
        with pytest.raises(RetrievalError, match="does not exist"):
            find([source])


def test_text_is_normalised_and_bad_bytes_are_reported(corpus):
    (corpus / "old.txt").write_bytes("挂失".encode("gb18030"))
    documents, rejects = read(find([str(corpus)]))
    assert [d.text for d in documents] == ["# 挂失\n致电。", "a\nb"]
    assert rejects[0].file.endswith("old.txt")
    assert rejects[0].reason.startswith("is not UTF-8 (byte 0xb9 in byte 0); it reads as GBK. Convert it: iconv")
    documents, _ = read([("old.txt", corpus / "old.txt")], "gb18030")
    assert documents[0].text == "挂失"


def test_a_relative_source_also_counts_from_home(corpus, monkeypatch, tmp_path_factory):
    """A submitted job runs in a copy of the working tree, where the corpus is not."""
    monkeypatch.chdir(tmp_path_factory.mktemp("job"))
    home = corpus.parent
    assert [name for name, _ in find(["kb"], home)] == ["cards/lost.md", "faq.txt"]
    assert [name for name, _ in find(["kb/**/*.md"], home)] == ["cards/lost.md"]
    with pytest.raises(RetrievalError, match=f"does not exist .looked for nowhere, {home}/nowhere"):
        find(["nowhere"], home)


def test_word_and_html_are_read_as_markdown_and_what_cannot_be_is_reported(corpus):
    (corpus / "fees.html").write_text("<html><body><h1>年费</h1><p>首年免年费。</p></body></html>", encoding="utf-8")
    (corpus / "old.doc").write_bytes(b"\xd0\xcf\x11\xe0 old")
    (corpus / "scan.pdf").write_bytes(b"%PDF-1.4 broken")
    (corpus / "~$fees.docx").write_bytes(b"lock")
    documents, rejects = read(find([str(corpus)]))
    assert {d.name: d.text for d in documents}["fees.html"] == "# 年费\n\n首年免年费。\n"
    assert all(d.is_markdown for d in documents if d.name != "faq.txt")
    reasons = {Path(reject.file).name: reject.reason for reject in rejects}
    assert reasons.keys() == {"old.doc", "scan.pdf"}
    assert reasons["old.doc"] == "is a Word file of before 2007. Save it as .docx."


def test_files_of_other_types_are_counted(corpus):
    (corpus / "rates.xlsx").write_bytes(b"PK")
    (corpus / "cards" / "more.XLSX").write_bytes(b"PK")
    (corpus / ".hidden.bin").write_bytes(b"")
    assert left_out([str(corpus)]) == {".png": 1, ".xlsx": 2}
    assert left_out(["kb"], corpus.parent) == {".png": 1, ".xlsx": 2}
    assert left_out([str(corpus / "faq.txt"), f"{corpus}/*.md"]) == {}
