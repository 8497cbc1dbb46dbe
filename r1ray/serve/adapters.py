"""The adapters beside one loaded base: which of them answers to which model id, following their aliases.

In the engine an adapter is named after its version, so that streams of the version before end on it while new ones begin on the next.
Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from r1ray.engine.protocol import Engine
from r1ray.errors import AdapterMismatch, UnsupportedModel
from r1ray.model.soft import soft_kind
from r1ray.serve.codec import Codec
from r1ray.serve.config import AdapterArgs
from r1ray.types import Artifact

__all__ = ["AdapterShelf", "LoadedAdapter", "check_adapter", "is_used"]

logger = logging.getLogger("ray.serve")


@dataclass(slots=True)
class LoadedAdapter:
    """An adapter in an engine. `artifact` is replaced when only its sampling policy changed."""

    artifact: Artifact
    codec: Codec
    num_streams: int = 0


def check_adapter(adapter: Artifact, base: Artifact) -> None:
    """Raises AdapterMismatch: `adapter` cannot be applied beside `base` in one batch with others."""
    if adapter.manifest.kind != "adapter" or soft_kind(adapter.path) is not None:
        what = "a soft prompt" if adapter.manifest.kind == "adapter" else f"of kind {adapter.manifest.kind}"
        raise AdapterMismatch(f"{adapter.ref} is {what}, not a LoRA adapter. Serve it as a model of its own.")
    if adapter.manifest.base_sha256 != base.manifest.weights_sha256:
        raise AdapterMismatch(
            f"{adapter.ref} was trained on {adapter.manifest.base}, and {base.ref} has other weights. "
            f"Set the model's ref to {adapter.manifest.base}, or serve the adapter as a model of its own."
        )


class AdapterShelf:
    """`find` asks the registry (blocking), `codec` reads an adapter's own tokenizer and template (blocking)."""

    def __init__(self, wanted: Sequence[AdapterArgs], find: Callable[[str], Artifact], codec: Callable[[Artifact], Codec]) -> None:
        self._wanted = tuple(wanted)
        self._find = find
        self._codec = codec
        self._failed: set[str] = set()

    async def refs(self) -> tuple[str, ...]:
        """The versions that are wanted now."""
        return tuple(artifact.ref for artifact in (await self._look()).values())

    async def find(self, base: Artifact) -> dict[str, Artifact]:
        """The wanted versions by model id.

        Raises:
            RegistryError, AdapterMismatch: one that is not there or does not belong beside `base`.
        """
        found = await self._look()
        for adapter in found.values():
            check_adapter(adapter, base)
        return found

    async def fill(self, found: Mapping[str, Artifact], engine: Engine) -> dict[str, LoadedAdapter]:
        """All of them loaded into a new engine.

        Raises:
            UnsupportedModel: the engine takes no adapters.
            AdapterMismatch: the engine cannot take one of them.
        """
        if found and "adapters" not in engine.capabilities:
            raise UnsupportedModel(
                f"{len(found)} adapters are to be served beside a model whose engine takes none (it is split, an ONNX export, "
                "or vLLM with vllm.max_adapters=0). Serve them as models of their own."
            )
        loaded: dict[str, LoadedAdapter] = {}
        for id_, artifact in found.items():
            loaded[id_] = await self._load(artifact, engine, loaded)
        return loaded

    async def follow(self, loaded: dict[str, LoadedAdapter], base: Artifact, engine: Engine) -> list[LoadedAdapter]:
        """One look at the registry. New versions answer from now on; those that they replace are returned, still loaded.

        A version that cannot be loaded is logged once and not tried again; the one before goes on.
        """
        replaced = []
        for id_, wanted in (await self._look()).items():
            old = loaded[id_]
            if wanted.ref == old.artifact.ref:
                old.artifact = wanted
            elif wanted.ref not in self._failed:
                try:
                    check_adapter(wanted, base)
                    loaded[id_] = await self._load(wanted, engine, loaded)
                except Exception:  # of this adapter alone: its base and the others answer on
                    self._failed.add(wanted.ref)
                    logger.exception("%s cannot be loaded; %s stays on %s", wanted.ref, id_, old.artifact.ref)
                    continue
                logger.info("%s switched from %s to %s; %d streams drain", id_, old.artifact.ref, wanted.ref, old.num_streams)
                replaced.append(old)
        return replaced

    async def _look(self) -> dict[str, Artifact]:
        return {args.id: await asyncio.to_thread(self._find, args.ref) for args in self._wanted}

    async def _load(self, artifact: Artifact, engine: Engine, loaded: Mapping[str, LoadedAdapter]) -> LoadedAdapter:
        codec = await asyncio.to_thread(self._codec, artifact)
        if not is_used(artifact, loaded):
            await engine.load_adapter(artifact.ref, artifact.path)
        return LoadedAdapter(artifact, codec)


def is_used(artifact: Artifact, loaded: Mapping[str, LoadedAdapter]) -> bool:
    """Whether some model id answers with this version: two may."""
    return any(each.artifact.ref == artifact.ref for each in loaded.values())
