"""Models, versions, aliases and lineage: a typed face over MLflow's model registry.

Weights stay in directories below R1RAY_HOME; MLflow holds a row per version that points there. A version exists when its
directory is complete and MLflow has numbered it, in that order, so no reader ever sees half a model.
Knows no training and no serving; loads no weights.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from r1ray.errors import ArtifactInvalid, PromotionRefused, RegistryError, VersionNotFound
from r1ray.observe.client import exclusive
from r1ray.registry import directory
from r1ray.registry.listing import ModelInfo, VersionInfo
from r1ray.registry.rows import PRODUCTION, Rows, checked, measured, noted
from r1ray.registry.verdict import Verdict
from r1ray.settings import Settings
from r1ray.types import Artifact, Manifest, SamplingPolicy

__all__ = ["Registry"]

_GATE = "gate"
_log = logging.getLogger(__name__)


class Registry:
    """Cheap to make and to pickle: the connection is opened at the first call and shared within a process."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._rows = Rows(self.settings)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A hidden directory to write a model into; gone after the block unless `register` took it.

        Raises:
            DiskFull: the block ran out of room.
        """
        with directory.staging(self.settings.artifacts, checked(name)) as staged:
            yield staged

    def register(
        self,
        staged: Path,
        manifest: Manifest,
        *,
        policy: SamplingPolicy | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Seal the staged directory, move it to its place and number it.

        `tags` go to the MLflow version; the tag `run_id` links the version to its MLflow run.
        """
        name = checked(manifest.name)
        sealed = directory.seal(staged, manifest)
        if policy is not None:
            directory.write_atomic(staged / directory.POLICY, policy)
        place = self.settings.artifacts / name / uuid.uuid4().hex[:12]
        place.parent.mkdir(parents=True, exist_ok=True)
        with directory.announced(place, self.settings.registry_uri):
            staged.rename(place)
            version = self._create_version(place, sealed, tags or {})
        return Artifact(path=place, manifest=sealed, version=version, policy=policy)

    def resolve(self, ref: str) -> Artifact:
        """The artifact of `name` (production, else the newest), `name@alias` or `name@3`, its files checked.

        Raises:
            ModelNotFound, VersionNotFound: with the names that exist.
            ArtifactInvalid: a file is missing, truncated or altered in size.
        """
        row = self._rows.find(ref)
        path = self._rows.place(row)
        artifact = directory.open_artifact(path, version=int(row.version))
        if noted(row).get("manifest_sha256") != directory.manifest_sha256(path):
            raise ArtifactInvalid(f"{path / directory.MANIFEST} was altered after {artifact.ref} was registered. Register it again.")
        return artifact

    def open(self, path: Path) -> Artifact:
        """A directory with a manifest, registered or not; version 0."""
        return directory.open_artifact(Path(path).absolute())

    def verify(self, ref: str) -> Artifact:
        """`resolve`, and the weights' hash too: reads every byte.

        Raises:
            ArtifactInvalid: the weights are not those that were registered.
        """
        artifact = self.resolve(ref)
        found = directory.weights_sha256(artifact.path)
        if found != artifact.manifest.weights_sha256:
            raise ArtifactInvalid(f"The weights in {artifact.path} have hash {found[:12]}, {ref} was registered with another. Roll back.")
        return artifact

    def versions(self, name: str) -> list[VersionInfo]:
        """Newest first."""
        aliases = self._rows.aliases(name)
        return [self._rows.listed(row, aliases) for row in self._rows.of(name)]

    def models(self) -> list[ModelInfo]:
        """Every model that r1ray registered, by name."""
        rows = self._rows.of(None)
        found = []
        for name in sorted({row.name for row in rows}):
            aliases = self._rows.aliases(name)
            versions = tuple(self._rows.listed(row, aliases) for row in rows if row.name == name)
            found.append(ModelInfo(name=name, versions=versions, aliases=aliases))
        return found

    def promote(self, ref: str, alias: str = PRODUCTION, *, force: bool = False) -> Artifact:
        """Point `alias` at the version, after checking that it is whole; remembers what it pointed at before.

        Args:
            force: Also where the gate said no or, with `settings.require_gate`, was not asked; logged.

        Raises:
            PromotionRefused: the gate's last verdict was no, or there is none and `settings.require_gate` wants one.
        """
        artifact = self.resolve(ref)
        if why := self._refusal(artifact):
            if not force:
                raise PromotionRefused(f"{artifact.ref} stays unpromoted, {alias} is unchanged: {why} --force overrides it.")
            _log.warning("%s is promoted by force: %s", artifact.ref, why)
        name = artifact.manifest.name
        with self._exclusive():
            history = self._rows.history(name, alias)
            if history[-1:] != [artifact.version]:
                history.append(artifact.version)
            self._rows.point(name, alias, history)
        return artifact

    def rollback(self, name: str, alias: str = PRODUCTION) -> Artifact:
        """Point `alias` back at the version it named before the last promotion; may be repeated.

        Raises:
            VersionNotFound: there is no earlier promotion whose version still exists.
        """
        with self._exclusive():
            existing = {info.version for info in self.versions(name)}
            history = self._rows.history(name, alias)
            current = history[-1] if history else None
            earlier = [version for version in history[:-1] if version in existing]
            while earlier and earlier[-1] == current:  # what lay between was deleted since
                earlier.pop()
            if not earlier:
                raise VersionNotFound(f"{name} has no earlier {alias} version to roll back to. Promote one: r1ray promote {name}@VERSION.")
            artifact = self.resolve(f"{name}@{earlier[-1]}")
            self._rows.point(name, alias, earlier)
        return artifact

    def keep(self, name: str, num: int = 3) -> list[int]:
        """Delete the oldest versions beyond the newest `num`; gives their numbers.

        Stays: what an alias points at, and every base or parent of a version that stays, of any model.
        """
        with self._exclusive():
            everything = [info for model in self.models() for info in model.versions]
            own = [info for info in everything if info.name == checked(name)]
            doomed = {info.ref for info in own[max(num, 0) :] if not info.aliases}
            doomed -= _ancestors([info for info in everything if info.ref not in doomed], everything)
            gone = [info for info in own if info.ref in doomed]
            for info in gone:
                self._rows.delete(name, info.version)
                shutil.rmtree(info.path, ignore_errors=True)
        return sorted(info.version for info in gone)

    def attach_policy(self, ref: str, policy: SamplingPolicy) -> Artifact:
        """Put sampling settings beside the weights; readers see the old file or the new one."""
        artifact = self.resolve(ref)
        directory.write_atomic(artifact.path / directory.POLICY, policy)
        self._rows.note(artifact.manifest.name, artifact.version, {"policy": policy.model_dump_json()})
        return self.resolve(artifact.ref)

    def annotate(self, ref: str, metrics: Mapping[str, float]) -> None:
        """Add evaluation metrics to the version; the manifest, written once, stays as it is."""
        artifact = self.resolve(ref)
        self._rows.note(artifact.manifest.name, artifact.version, measured(metrics))

    def record_verdict(self, ref: str, verdict: Verdict) -> None:
        """Put the gate's verdict on the version, in place of an earlier one."""
        artifact = self.resolve(ref)
        self._rows.note(artifact.manifest.name, artifact.version, {_GATE: verdict.model_dump_json()})

    def verdict(self, ref: str) -> Verdict | None:
        """The gate's last verdict on the version; None where it was never asked."""
        stored = noted(self._rows.find(self.resolve(ref).ref)).get(_GATE)
        return Verdict.model_validate_json(stored) if stored else None

    def lineage(self, ref: str) -> list[Artifact]:
        """The version, then its ancestors, nearest first; one that no longer exists is logged and left out."""
        found: dict[str, Artifact] = {}
        queue = [self.resolve(ref).ref]
        while queue:
            current = queue.pop(0)
            if current in found:
                continue
            try:
                artifact = self.resolve(current)
            except RegistryError as error:
                _log.warning("lineage of %s: %s", ref, error)
                continue
            found[current] = artifact
            manifest = artifact.manifest
            queue += [*manifest.parents, *([manifest.base] if manifest.base else [])]
        return list(found.values())

    def _refusal(self, artifact: Artifact) -> str | None:
        verdict = self.verdict(artifact.ref)
        if verdict is None:
            wanted = self.settings.require_gate
            return "it has not passed the gate, which R1RAY_REQUIRE_GATE wants. Run jobs/gate.py." if wanted else None
        if verdict.passed:
            return None
        failed = ", ".join(verdict.failed)
        return f"the gate said no at {verdict.at} ({failed}; {verdict.report}). Train a better one, or run jobs/gate.py again."

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Connect first: opening the store takes seconds that nobody else should wait for."""
        _ = self._rows.client
        with exclusive(directory.directory_lock(self.settings.artifacts)):
            yield

    def _create_version(self, place: Path, manifest: Manifest, tags: Mapping[str, str]) -> int:
        with self._exclusive():
            self._sweep()
            return self._rows.create(place, manifest, tags)

    def _sweep(self) -> None:
        """Remove what writers left that died between a directory's last move and its number; one that has a number stays."""
        for note, place in directory.abandoned(self.settings.artifacts, self.settings.registry_uri):
            if all(self._rows.place(row) != place for row in self._rows.of(place.parent.name)):
                _log.warning("removing %s: its writer died before it had a version number", place)
                shutil.rmtree(place, ignore_errors=True)
            note.unlink(missing_ok=True)


def _ancestors(kept: list[VersionInfo], everything: list[VersionInfo]) -> set[str]:
    """References of every base and parent of `kept`, transitively."""
    by_ref = {info.ref: info for info in everything}
    found: set[str] = set()
    queue = list(kept)
    while queue:
        info = queue.pop()
        for ref in (*info.parents, *([info.base] if info.base else [])):
            if ref in by_ref and ref not in found:
                found.add(ref)
                queue.append(by_ref[ref])
    return found
