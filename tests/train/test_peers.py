from __future__ import annotations

import pytest

from r1ray.errors import ConfigError, DataError
from r1ray.train import peers as module
from r1ray.train.peers import Peers
from tests.train.ranked import ranks


def test_everybody_hears_everybody_and_rank_0_time_after_time() -> None:
    heard = ranks(3, lambda peers: (peers.gathered(peers.rank * 10), peers.told(f"from {peers.rank}"), peers.gathered(None)))
    assert heard == [([0, 10, 20], "from 0", [None] * 3)] * 3


def test_a_rank_alone_needs_no_store() -> None:
    alone = Peers.of_group(0, 1)
    assert alone.gathered("x") == ["x"] and alone.told(1) == 1 and alone.fail_alike(ValueError())


@pytest.mark.parametrize(
    ("kinds", "alike"), [([DataError, DataError], True), ([DataError, ConfigError], False), ([DataError, None], False)], ids=str
)
def test_an_error_counts_as_everybodys_only_when_all_ranks_have_its_kind(kinds, alike, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ALIKE_S", 0.2)
    found = ranks(2, lambda peers: (kind := kinds[peers.rank]) and peers.fail_alike(kind(f"on {peers.rank}")))
    assert found == [alike if kind else None for kind in kinds]
