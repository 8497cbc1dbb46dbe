"""What will be served, looked up before anything is deployed: card and collection of each model and of the adapters beside it.

Errors here cost seconds, not replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from r1ray.engine.kinds import check_kind
from r1ray.model import template
from r1ray.registry import Registry
from r1ray.retrieval import layout
from r1ray.serve.adapters import check_adapter
from r1ray.serve.chat import Card
from r1ray.serve.config import AdapterArgs, ModelArgs
from r1ray.settings import Settings
from r1ray.types import Artifact

__all__ = ["Entry", "look_up"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model as the registry knows it now."""

    card: Card
    collection: str | None


def look_up(models: Iterable[ModelArgs], settings: Settings | None = None) -> dict[str, Entry]:
    """Model id -> entry.

    Raises:
        RegistryError: a reference that names no complete version.
        UnsupportedModel: a reward model, which writes no answers, or a version that its engine cannot run.
        TemplateMismatch: a chat template other than the version's own.
        AdapterMismatch: an adapter that does not belong beside its model.
        CollectionNotFound: a collection that was not built in this home.
    """
    settings = settings or Settings()
    registry = Registry(settings)
    found: dict[str, Entry] = {}
    for args in models:
        base = registry.resolve(args.ref)
        found[args.id] = entry = _entry(args, base, settings)
        for adapter in args.adapters:
            found[adapter.id] = _beside(adapter, registry.resolve(adapter.ref), base, entry.card, settings)
    return found


def _entry(args: ModelArgs, artifact: Artifact, settings: Settings) -> Entry:
    check_kind(artifact, args.engine)
    template.check_override(artifact, Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None)
    longest = min(artifact.manifest.context_length, args.engine.max_context or artifact.manifest.context_length)
    card = Card(id=args.id, created=_created(artifact), root=artifact.ref, max_model_len=longest)
    return Entry(card=card, collection=_collection(args, artifact, settings))


def _beside(args: AdapterArgs, artifact: Artifact, base: Artifact, of_base: Card, settings: Settings) -> Entry:
    check_adapter(artifact, base)
    card = replace(of_base, id=args.id, created=_created(artifact), root=artifact.ref, parent=of_base.id)
    return Entry(card=card, collection=_collection(args, artifact, settings))


def _created(artifact: Artifact) -> int:
    return int(datetime.fromisoformat(artifact.manifest.created_at).timestamp())


def _collection(args: ModelArgs | AdapterArgs, artifact: Artifact, settings: Settings) -> str | None:
    collection = artifact.manifest.collection if args.collection is None else args.collection
    if collection:
        layout.read_manifest(settings.indexes / collection)
    return collection or None
