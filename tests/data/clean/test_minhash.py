"""Signatures estimate what they claim, and duplicates are found in any batching."""

import random

import numpy as np
import pytest

from r1ray.data.clean.duplicates import ExactDuplicates, NearDuplicates, keys_of
from r1ray.data.clean.index import KeyIndex
from r1ray.data.clean.minhash import normalised, short, signatures, similarity
from r1ray.data.prepare.config import NearDuplicateConfig


def jaccard(left, right, n=5):
    a, b = ({text[i : i + n] for i in range(len(text) - n + 1)} for text in (left, right))
    return len(a & b) / len(a | b)


def texts(num, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(3000)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(num)]


@pytest.mark.parametrize("kept", [5, 15, 25])
def test_the_estimate_is_the_jaccard_similarity_within_its_error(kept):
    left, other = texts(200), texts(200, seed=1)
    right = [" ".join([*a.split()[:kept], *b.split()[kept:]]) for a, b in zip(left, other, strict=True)]
    true = np.array([jaccard(a, b) for a, b in zip(left, right, strict=True)])
    estimated = similarity(*(short(signatures(t, num_hashes=128, shingle=5)) for t in (left, right)))
    assert abs(float((estimated - true).mean())) < 0.02
    assert float(np.abs(estimated - true).mean()) < 0.06  # one standard error of 128 hashes is at most 0.044


def test_equal_texts_have_equal_signatures_wherever_they_stand_in_a_batch():
    batch = texts(20)
    alone = np.concatenate([signatures([text], num_hashes=64, shingle=5) for text in batch])
    assert (signatures(batch, num_hashes=64, shingle=5) == alone).all()
    assert len(np.unique(alone, axis=0)) == 20


def test_texts_shorter_than_a_shingle_have_a_signature():
    assert signatures(["a", "", "a"], num_hashes=16, shingle=5).shape == (3, 16)


def test_normalising_removes_case_blanks_and_width():
    assert normalised("Ｈello  \n World，") == normalised("hello world,")


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_near_duplicates_are_found_whatever_the_batches(batch):
    base = texts(60)
    near = [f"{text} indeed" for text in base]
    rows = [*base, *near, *texts(60, seed=9)]
    index = NearDuplicates(NearDuplicateConfig())
    found = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        earlier, alike = index.add(signatures(part, num_hashes=128, shingle=5), np.zeros(len(part), np.uint64))
        assert ((alike >= 0.8) == (earlier >= 0)).all()
        found += list(earlier)
    assert found == [-1] * 60 + list(range(60)) + [-1] * 60


def test_rows_of_different_groups_are_no_duplicates():
    index = NearDuplicates(NearDuplicateConfig())
    same = signatures(["I lost my credit card today"] * 3, num_hashes=128, shingle=5)
    assert list(index.add(same, np.array([1, 2, 1], np.uint64))[0]) == [-1, -1, 0]


def test_only_kept_rows_count_so_that_a_chain_of_changes_ends():
    words = texts(1)[0].split()
    chain = [" ".join(words[: 30 - k] + ["zzzz"] * k) for k in range(0, 15, 2)]
    index = NearDuplicates(NearDuplicateConfig(num_bands=32))
    earlier, _ = index.add(signatures(chain, num_hashes=128, shingle=5), np.zeros(len(chain), np.uint64))
    kept = [text for text, other in zip(chain, earlier, strict=True) if other < 0]
    assert 1 < len(kept) < len(chain)


def test_an_index_finds_every_row_of_a_key():
    rng = np.random.default_rng(0)
    index, truth = KeyIndex(max_rows=1000), {}
    for start in range(0, 2000, 100):
        keys = rng.integers(0, 300, 100).astype(np.uint64)
        index.add(keys, np.arange(start, start + 100))
        for key, row in zip(keys, range(start, start + 100), strict=True):
            truth.setdefault(int(key), []).append(row)
    positions, rows = index.find(np.arange(310, dtype=np.uint64))
    found = {}
    for position, row in zip(positions, rows, strict=True):
        found.setdefault(int(position), []).append(int(row))
    assert {key: sorted(rows) for key, rows in found.items()} == truth
    assert index.num_bytes == 2000 * 16


def test_exact_duplicates_name_the_first_row():
    index = ExactDuplicates()
    assert list(index.add(keys_of(["a", "b", "a"]))) == [-1, -1, 0]
    assert list(index.add(keys_of(["c", "b", "c"]))) == [-1, 1, 2]
    assert list(index.known(keys_of(["b", "d"]))) == [1, -1]
