"""What will be served, looked up before anything is deployed: each model's card and collection. Errors here cost seconds, not replicas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from r1ray.engine.kinds import check_kind
from r1ray.model import template
from r1ray.registry import Registry
from r1ray.retrieval import layout
from r1ray.serve.chat import Card
from r1ray.serve.config import ModelArgs
from r1ray.settings import Settings

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
        CollectionNotFound: a collection that was not built in this home.
    """
    settings = settings or Settings()
    registry = Registry(settings)
    return {args.id: _entry(args, registry, settings) for args in models}


def _entry(args: ModelArgs, registry: Registry, settings: Settings) -> Entry:
    artifact = registry.resolve(args.ref)
    check_kind(artifact, args.engine)
    template.check_override(artifact, Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None)
    collection = artifact.manifest.collection if args.collection is None else args.collection
    if collection:
        layout.read_manifest(settings.indexes / collection)
    return Entry(
        card=Card(
            id=args.id,
            created=int(datetime.fromisoformat(artifact.manifest.created_at).timestamp()),
            root=artifact.ref,
            max_model_len=min(artifact.manifest.context_length, args.engine.max_context or artifact.manifest.context_length),
        ),
        collection=collection or None,
    )
