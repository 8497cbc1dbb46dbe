from __future__ import annotations

import socket
from pathlib import Path

import pytest

from r1ray.errors import HomeNotShared
from r1ray.train import shared
from tests.train.ranked import ranks


def seen(directories: list[Path], token: str) -> list[HomeNotShared | None]:
    """What each rank finds that has its own idea of where the run is."""
    return ranks(len(directories), lambda peers: shared.check(directories[peers.rank], token, peers))


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(shared, "_PATIENCE_S", 0.2)


def test_ranks_with_one_directory_agree_and_leave_nothing(tmp_path) -> None:
    with shared.offered(tmp_path) as token:
        assert seen([tmp_path] * 3, token) == [None] * 3
        assert seen([tmp_path] * 2, token) == [None] * 2, "workers that were started again"
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_a_directory_of_its_own_is_named_on_every_rank(tmp_path) -> None:
    driver, other = tmp_path / "driver", tmp_path / "other"
    other.mkdir()
    with shared.offered(driver) as token:
        found = seen([driver, other], token)
    for error in found:
        assert isinstance(error, HomeNotShared)
        assert getattr(error, "agreed", False), "to start the workers again changes nothing"
        assert f"worker 1 on {socket.gethostname()} finds nothing at {other}" in str(error)
        assert "R1RAY_HOME" in str(error)


def test_a_copy_of_the_directory_is_not_the_directory(tmp_path) -> None:
    driver, copy = tmp_path / "driver", tmp_path / "copy"
    with shared.offered(driver) as token:
        (copy / ".shared" / token).mkdir(parents=True)
        (copy / ".shared" / token / "driver").touch()
        found = seen([driver, copy], token)
    assert all("worker 1" in str(error) and "does not see it" in str(error) for error in found)
