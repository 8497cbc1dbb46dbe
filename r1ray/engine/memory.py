"""How many blocks of the KV cache there is room for, measured where the weights lie already.

Takes what each process of a model has free after loading (`Room`) and what the cache shall hold (`CacheWish`); gives one number for all of
them, since a stream has the same blocks everywhere. Processes that lie in one memory share it. Knows no model and no stages.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.config import EngineConfig
from r1ray.engine.scheduler import IDLE_CHUNK_FACTOR
from r1ray.errors import InvalidValue

__all__ = ["CacheWish", "Room", "blocks_for", "num_kv_blocks", "room_on"]

log = logging.getLogger(__name__)

KV_SHARE = {"cpu": 0.15, "cuda": 0.9}  # of the memory that is free after loading, where the config does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheWish:
    """`num_slots` streams of `context` positions each, prompts in passes of `prefill_chunk`; at most `gigabytes` in a process, if given."""

    num_slots: int
    context: int
    prefill_chunk: int = 256
    gigabytes: float | None = None

    @classmethod
    def of(cls, config: EngineConfig) -> CacheWish:
        assert config.max_context is not None, "create_engine has filled it in"
        return cls(num_slots=config.num_slots, context=config.max_context, prefill_chunk=config.prefill_chunk, gigabytes=config.kv_cache_gb)

    @property
    def num_blocks(self) -> int:
        """More would be of no use."""
        return self.num_slots * -(-self.context // BLOCK_SIZE) + 1

    @property
    def largest_pass(self) -> int:
        """Tokens."""
        return self.num_slots + IDLE_CHUNK_FACTOR * self.prefill_chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a process has left. `memory` is the GPU or the machine that it lies in; a pass takes `workspace_bytes` besides the cache."""

    memory: str
    kind: str
    free_bytes: int
    bytes_per_block: int
    workspace_bytes: int = 0


def room_on(device: str, bytes_per_block: int, workspace_bytes: int = 0) -> Room:
    """Of this process, now, on a torch device."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        name = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
        free = int(torch.cuda.mem_get_info(torch.device(device))[0])
        return Room(memory=name, kind="cuda", free_bytes=free, bytes_per_block=bytes_per_block, workspace_bytes=workspace_bytes)
    free = int(psutil.virtual_memory().available)
    return Room(memory=platform.node(), kind="cpu", free_bytes=free, bytes_per_block=bytes_per_block)


def blocks_for(rooms: Sequence[Room], wish: CacheWish) -> int:
    """Blocks that every process of the model can hold: `gigabytes`, or what all slots' full contexts need within a share of what is free.

    Raises:
        InvalidValue: beside the weights there is no room for two blocks.
    """
    num = min([wish.num_blocks, *(_blocks_in([room for room in rooms if room.memory == name], wish) for name in {r.memory for r in rooms})])
    if num < wish.num_blocks:
        gigabytes = num * max(room.bytes_per_block for room in rooms) / 1e9
        log.info("KV cache: %d tokens in %.2f GB, for %d slots of %d", num * BLOCK_SIZE, gigabytes, wish.num_slots, wish.context)
    return num


def _blocks_in(rooms: Sequence[Room], wish: CacheWish) -> int:
    """Those that lie in one memory each take the same number of blocks, of their own size."""
    if wish.gigabytes is not None:
        return max(2, min(int(wish.gigabytes * 1e9 // room.bytes_per_block) for room in rooms))
    free, workspace = min(room.free_bytes for room in rooms), sum(room.workspace_bytes for room in rooms)
    num = int((KV_SHARE.get(rooms[0].kind, 0.5) * free - workspace) // sum(room.bytes_per_block for room in rooms))
    if num < 2:
        raise InvalidValue(
            f"After loading {free / 1e9:.2f} GB are free on {rooms[0].memory}; a pass wants {workspace / 1e9:.2f} GB of it and nothing is "
            "left for the KV cache. Lower engine.max_context, num_slots or prefill_chunk, set kv_cache_gb, or set more stages."
        )
    return num


def num_kv_blocks(config: EngineConfig, bytes_per_token: int, device: str, *, weight_bytes: int = 0) -> int:
    """For an engine of one process that loads its weights, which will take so much of a GPU, together with its cache."""
    return blocks_for([room_on(device, bytes_per_token * BLOCK_SIZE, weight_bytes)], CacheWish.of(config))
