"""What a listing of the registry shows: a row per version, and a model with its versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1ray.types import ArtifactKind

__all__ = ["ModelInfo", "VersionInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """One row of `r1ray models NAME`. `metrics` unites the manifest's and those that evaluations added."""

    name: str
    version: int
    kind: ArtifactKind
    created_at: str
    path: Path
    weights_sha256: str
    data_hash: str | None = None
    base: str | None = None
    aliases: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One registered model: its versions, newest first, and where its aliases point."""

    name: str
    versions: tuple[VersionInfo, ...]
    aliases: Mapping[str, int]
