"""Building a collection: complete or not at all, and never twice the same work."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from r1ray.errors import CollectionNotFound, RetrievalError
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.index import build_index
from r1ray.retrieval.layout import collections
from r1ray.retrieval.lexical import Lexical
from r1ray.retrieval.search import Retriever, fuse
from r1ray.settings import Settings

TOPICS = ("挂失", "loan", "transfer", "密码")


class TopicEmbedder:
    """Vectors that count topic words; remembers how many texts it embedded."""

    def __init__(self, name="topics"):
        self.name = name
        self.dimension = len(TOPICS) + 1
        self.num_embedded = 0

    def passages(self, texts):
        self.num_embedded += len(texts)
        return np.stack([self.query(text) for text in texts])

    def query(self, text):
        vector = np.array([text.count(topic) for topic in TOPICS] + [0.1], dtype=np.float32)
        return vector / np.linalg.norm(vector)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "kb"
    folder.mkdir()
    (folder / "a.md").write_text("# 挂失\n银行卡挂失请致电客服。\n# Loan\nA loan needs a contract.\n", encoding="utf-8")
    (folder / "b.md").write_text("# 密码\n重置密码请携带证件到网点。\n", encoding="utf-8")
    return folder


@pytest.fixture
def build(tmp_path, corpus):
    def run(embedder=None, **changes):
        config = IndexConfig(**{"collection": "bank", "sources": (str(corpus),), **changes})
        return build_index(config, Settings(home=tmp_path), embedder=embedder or TopicEmbedder(), progress=lambda _: None)

    return run


def test_a_built_collection_is_found_by_vector_words_and_both(build):
    stats = build()
    assert (stats.num_documents, stats.num_chunks, stats.num_embedded, stats.changed) == (2, 3, 3, True)
    retriever = Retriever(stats.path, embedder=TopicEmbedder())
    for mode in ("hybrid", "vector", "bm25"):
        best = retriever.search("我要挂失", k=1, mode=mode)[0]
        assert (best.id, best.source, best.heading) == ("a.md#挂失", "a.md", "挂失")
        assert best.score > 0
    assert retriever.search("  ") == []
    assert retriever.search("zzz", mode="bm25") == []


def test_an_unchanged_corpus_is_not_written_again(build):
    first, second = build(), build()
    assert (second.changed, second.num_embedded, second.num_reused) == (False, 0, 3)
    assert Retriever(first.path, embedder=TopicEmbedder()).manifest.num_chunks == 3


def test_only_changed_passages_are_embedded_again(build, corpus):
    build()
    (corpus / "b.md").write_text("# 密码\n密码可在手机银行重置。\n", encoding="utf-8")
    embedder = TopicEmbedder()
    stats = build(embedder)
    assert (stats.num_embedded, stats.num_reused, embedder.num_embedded) == (1, 2, 1)


def test_an_open_retriever_sees_the_new_build_at_its_next_search(build, corpus):
    retriever = Retriever(build().path, embedder=TopicEmbedder())
    (corpus / "c.md").write_text("# Transfer\nA transfer takes one day.\n")
    build()
    assert retriever.search("transfer", k=1)[0].id == "c.md#transfer"


def test_two_builds_stay_on_disk_and_older_ones_go(build, corpus):
    for number in range(4):
        (corpus / "c.md").write_text(f"# N\n{number}\n")
        path = build().path
    assert len(list(path.glob("build-*"))) == 2
    assert not list(path.glob(".building-*"))


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.index import build_index
from r1ray.settings import Settings

class Killer:
    name, dimension = "killer", 5
    def passages(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)

build_index(IndexConfig(collection="bank", sources=(sys.argv[2],)), Settings(home=Path(sys.argv[1])), embedder=Killer())
"""


def test_a_killed_build_leaves_the_old_index_and_no_rubbish_after_the_next(build, corpus, tmp_path):
    path = build().path
    (corpus / "c.md").write_text("# Transfer\nA transfer takes one day.\n")
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(tmp_path), str(corpus)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(path.glob(".building-*"))
    assert Retriever(path, embedder=TopicEmbedder()).search("挂失", k=1)[0].id == "a.md#挂失"
    assert build().num_chunks == 4
    assert not list(path.glob(".building-*"))


def test_two_builds_of_one_collection_at_once_are_refused(build):
    class Reentrant(TopicEmbedder):
        def passages(self, texts):
            build()
            raise AssertionError("the second build should have been refused")

    with pytest.raises(RetrievalError, match="Another job is building 'bank'"):
        build(Reentrant())


def test_an_index_of_another_embedding_is_refused(build):
    path = build().path
    with pytest.raises(RetrievalError, match="indexed with 'topics', the query would be embedded with 'other'"):
        Retriever(path, embedder=TopicEmbedder("other"))
    with pytest.raises(RetrievalError, match="No embedding 'topics' here"):
        Retriever(path)


def test_another_embedding_embeds_everything_anew(build):
    build()
    assert build(TopicEmbedder("other")).num_embedded == 3


def test_without_vectors_bm25_answers_alone(build):
    retriever = Retriever(build(embedding="none").path)
    assert retriever.search("密码", k=1)[0].id == "b.md#密码"
    with pytest.raises(RetrievalError, match="has no vectors"):
        retriever.search("密码", mode="vector")


def test_a_missing_collection_names_the_existing_ones(build, tmp_path):
    build()
    assert collections(Settings(home=tmp_path).indexes) == ["bank"]
    with pytest.raises(CollectionNotFound, match=r"No collection 'shop' .*there: bank"):
        Retriever(Settings(home=tmp_path).indexes / "shop")


def test_a_damaged_manifest_is_reported_and_mended_by_a_build(build):
    path = build().path
    (path / "manifest.json").write_text("{")
    with pytest.raises(RetrievalError, match="is damaged"):
        Retriever(path, embedder=TopicEmbedder())
    assert build().changed


def test_an_empty_corpus_is_an_error(build, corpus):
    for file in corpus.iterdir():
        file.write_text("\n")
    with pytest.raises(RetrievalError, match="hold no text"):
        build()


def test_too_many_unreadable_files_fail_and_few_are_reported(build, corpus):
    (corpus / "old.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RetrievalError, match="1 of 3 files are unreadable"):
        build()
    assert build(max_bad_share=0.5).rejects[0].file.endswith("old.txt")


def test_k_must_be_positive(build):
    with pytest.raises(RetrievalError, match="k is 0"):
        Retriever(build().path, embedder=TopicEmbedder()).search("挂失", k=0)


def test_fusion_rewards_agreement_over_a_single_first_place():
    assert fuse([[1, 2, 3], [4, 2, 5]])[0][0] == 2
    assert fuse([[7], []])[0] == (7, 1 / 61)


def test_words_the_corpus_lacks_rank_nothing(tmp_path):
    lexical = Lexical.build(["银行卡挂失", "lost card", "的"])
    assert lexical.rank("card LOST", 5) == [1]
    assert lexical.rank("unknown", 5) == []
    lexical.save(tmp_path / "bm25")
    assert Lexical.load(tmp_path / "bm25", 3).rank("挂失", 5) == [0]
