"""Who owns which block of the KV cache: reference counts, shared prefixes by hash, eviction of the least recently used.

A block holds 32 positions. Streams that begin alike share the blocks of the common beginning; a block that nobody holds stays findable
until its room is needed. Numbers only: the backend holds the tensors. Knows no streams.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from r1ray.engine.backend import BLOCK_SIZE

__all__ = ["BlockPool", "prefix_keys"]


def prefix_keys(ids: Sequence[int], salt: str, *, first: int = 0, parent: bytes = b"") -> Iterator[bytes]:
    """The key of each full block of `ids` from block `first` on; `parent` is the key of the block before.

    A key stands for its block and everything before it. `salt` keeps apart what must not be shared: tenants, adapters.
    """
    key = parent or hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for begin in range(first * BLOCK_SIZE, len(ids) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
        block = array("q", ids[begin : begin + BLOCK_SIZE]).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        yield key


class BlockPool:
    """`num_blocks` blocks; each is free, held by one or more streams, or idle: held by nobody, but findable by its key.

    A block whose content is doubted is findable no more, and comes to `take_doubted` when its last holder has let go of it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._doubted: set[int] = set()  # held still
        self._to_clear: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return len(self._holders)

    def take(self, num: int) -> list[int] | None:
        """`num` blocks with one holder each; None, and nothing taken, when there are not so many."""
        if num > self.num_free:
            return None
        taken = [self._free.pop() if self._free else self._evict() for _ in range(num)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning, each with one more holder."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            found.append(block)
        return found

    def publish(self, block: int, key: bytes) -> None:
        """From now on `find` knows this full block. The first of two equal blocks stays the known one."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less. Later blocks of a stream become the first to be evicted: without them the earlier ones are still of use."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._idle[block] = None
                continue
            self._free.append(block)
            if block in self._doubted:
                self._doubted.remove(block)
                self._to_clear.append(block)

    def doubt(self, blocks: Iterable[int]) -> None:
        """Held blocks may hold what spoils sums. Who shares them keeps them: overwriting would falsify its answer without a word, while
        damaged ones show in its own logits.
        """
        doubted = list(blocks)
        self.forget(doubted)
        self._doubted.update(doubted)

    def take_doubted(self) -> list[int]:
        """Blocks to overwrite before anything else is written: nobody who wrote them holds them any more."""
        taken, self._to_clear = self._to_clear, []
        return taken

    def forget(self, blocks: Iterable[int]) -> None:
        """`find` knows these blocks no more; who holds them keeps them."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
                if block in self._idle:
                    del self._idle[block]
                    self._free.append(block)
