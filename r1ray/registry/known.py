"""A registry for a process that works on versions which somebody has resolved already: these cost it no connection.

MLflow alone takes five seconds of a core to import, in every actor of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterable

from r1ray.registry.versions import Registry
from r1ray.settings import Settings
from r1ray.types import Artifact

__all__ = ["KnownVersions"]


class KnownVersions(Registry):
    """Resolves `known` by `name@version` as they were; every other reference as a Registry does. Picklable."""

    def __init__(self, known: Iterable[Artifact], settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._known = {artifact.ref: artifact for artifact in known}

    def resolve(self, ref: str) -> Artifact:
        return self._known[ref] if ref in self._known else super().resolve(ref)
