from __future__ import annotations

import socket

import pytest

from r1ray.errors import CheckpointCorrupt, OutOfMemory, R1RayError, RegistryError
from r1ray.train import peers as module
from r1ray.train.peers import Peers
from r1ray.train.worker import _told
from tests.train.ranked import ranks


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(module, "_ALIKE_S", 0.2)


def outcomes(*errors: R1RayError | None) -> list:
    """What Ray Train gets to see of each rank, where some go on."""

    def end(peers: Peers):
        error = errors[peers.rank]
        return _told(error, peers) if error is not None else "waits for the others"

    return ranks(len(errors), end)


def test_what_one_node_alone_cannot_reach_ends_the_attempt_instead_of_leaving_the_others_waiting() -> None:
    going_on, raised = outcomes(None, RegistryError("No MLflow server answers at http://m:5000."))
    assert going_on == "waits for the others"
    assert isinstance(raised, RegistryError), "raised, so that Ray Train ends the other"
    assert f"No MLflow server answers at http://m:5000. Only worker 1 on {socket.gethostname()} says so." in str(raised)


def test_a_mistake_that_every_rank_meets_is_told_and_not_repeated() -> None:
    errors = RegistryError("no such version"), RegistryError("no such version")
    assert outcomes(*errors) == [{"error": error} for error in errors]


def test_a_failure_of_training_is_left_to_ray_unless_all_agreed() -> None:
    lost, agreed = OutOfMemory("too small"), CheckpointCorrupt("none left")
    agreed.agreed = True  # type: ignore[attr-defined]
    assert outcomes(lost, agreed) == [lost, {"error": agreed}]
