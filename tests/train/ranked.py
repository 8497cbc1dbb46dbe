"""Ranks of a training as threads of one process, for what they tell each other without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from r1ray.train.peers import Peers


def ranks(num: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What `work` gives on each of `num` ranks, or the exception that it raises there."""
    store, given = dist.HashStore(), [None] * num

    def run(rank: int) -> None:
        try:
            given[rank] = work(Peers(rank, num, store))
        except Exception as error:
            given[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for ever"
    return given
