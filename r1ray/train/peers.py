"""What the ranks of one attempt tell each other outside of the steps: where to start, what is wrong, that all are ready.

It goes through the rendezvous store of their process group and is no collective: a rank may check files or convert a checkpoint for an
hour while the others wait, where NCCL would give up. All ranks call the same methods in the same order. Knows nothing of what is told.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from r1ray.errors import TrainingError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Peers"]

_LIMIT_S = 24 * 3600.0
"""Of a rank that lives and says nothing; Ray Train sees within a second that one has died or raised, and ends the others."""
_ALIKE_S = 10.0
_LONGEST_NAP_S = 0.5
_ATTEMPTS = count()

T = TypeVar("T")


class Peers:
    """Seen from `rank`, one of `world`. `store` may be None where there is one only."""

    def __init__(self, rank: int, world: int, store: Store | None) -> None:
        assert store is not None or world == 1, "several ranks need a process group"
        self.rank, self.world = rank, world
        self._store, self._num_told = store, 0

    @classmethod
    def of_group(cls, rank: int, world: int) -> Peers:
        """Through the store of torch's process group, in names that no earlier attempt of this process has used."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return cls(rank, world, None)
        store = dist.distributed_c10d._get_default_store()
        return cls(rank, world, dist.PrefixStore(f"r1ray/{next(_ATTEMPTS)}", store))  # type: ignore[attr-defined]  # it is public

    def gathered(self, value: T) -> list[T]:
        """Everyone's value, by rank; waits for the slowest.

        Raises:
            TrainingError: a rank said nothing for a day.
        """
        if self._store is None:
            return [value]
        self._num_told += 1
        keys = [f"{self._num_told}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes are right, torch's stub is not
        if not self._are_there(keys, _LIMIT_S):
            silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise TrainingError(f"Worker {self.rank} waited {_LIMIT_S / 3600:.0f} hours for workers {silent}. Look at their logs.")
        return [pickle.loads(answer) for answer in self._store.multi_get(keys)]

    def told(self, value: T) -> T:
        """Rank 0's value; those of the others count for nothing."""
        return self.gathered(value)[0]

    def fail_alike(self, error: BaseException) -> bool:
        """Whether every rank calls this with an error of the same kind; waits a few seconds for the others."""
        if self._store is None:
            return True
        keys = [f"failed/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], type(error).__qualname__)
        return self._are_there(keys, _ALIKE_S) and len(set(self._store.multi_get(keys))) == 1

    def _are_there(self, keys: Sequence[str], limit_s: float) -> bool:
        """Asks again and again: `Store.wait` would keep the connection from NCCL's own threads."""
        assert self._store is not None
        end, nap_s = time.monotonic() + limit_s, 0.002
        while not self._store.check(list(keys)):
            if time.monotonic() >= end:
                return False
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        return True
