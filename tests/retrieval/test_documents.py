"""Sources become named texts; whatever cannot be read is reported."""

import pytest

from r1ray.errors import RetrievalError
from r1ray.retrieval.documents import find, read


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "kb" / "cards").mkdir(parents=True)
    (tmp_path / "kb" / "cards" / "lost.md").write_text("# 挂失\n致电。", encoding="utf-8")
    (tmp_path / "kb" / "faq.txt").write_text("﻿a\r\nb", encoding="utf-8")
    (tmp_path / "kb" / "logo.png").write_bytes(b"\x89PNG")
    return tmp_path / "kb"


def test_a_directory_is_searched_for_markdown_and_text_only(corpus):
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
    for source in (str(corpus / "nothing"), f"{corpus}/*.rst", str(corpus / "logo.png") + "/x"):
        with pytest.raises(RetrievalError, match="holds no"):
            find([source])


def test_text_is_normalised_and_bad_bytes_are_reported(corpus):
    (corpus / "old.txt").write_bytes("挂失".encode("gb18030"))
    documents, rejects = read(find([str(corpus)]))
    assert [d.text for d in documents] == ["# 挂失\n致电。", "a\nb"]
    assert rejects[0].file.endswith("old.txt")
    assert "not utf-8 at byte 0" in rejects[0].reason
    documents, _ = read([("old.txt", corpus / "old.txt")], "gb18030")
    assert documents[0].text == "挂失"
