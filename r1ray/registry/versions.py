"""Models, versions, aliases and lineage: a typed face over MLflow's model registry.

Weights stay in directories below R1RAY_HOME; MLflow holds a row per version that points there. A version exists when its
directory is complete and MLflow has numbered it, in that order, so no reader ever sees half a model.
Knows no training and no serving; loads no weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import ArtifactInvalid, InvalidValue, ModelNotFound, PromotionRefused, RegistryError, VersionNotFound
from r1ray.observe.client import client, exclusive
from r1ray.registry import directory
from r1ray.registry.listing import ModelInfo, VersionInfo
from r1ray.registry.verdict import Verdict
from r1ray.settings import Settings
from r1ray.types import Artifact, Manifest, SamplingPolicy

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["Registry"]

PRODUCTION = "production"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TAG = "r1ray."
_METRIC = _TAG + "metric."
_HISTORY = _TAG + "history."
_GATE = _TAG + "gate"
_LONGEST_HISTORY = 50
_log = logging.getLogger(__name__)


class Registry:
    """Cheap to make and to pickle: the connection is opened at the first call and shared within a process."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A hidden directory to write a model into; gone after the block unless `register` took it.

        Raises:
            DiskFull: the block ran out of room.
        """
        with directory.staging(self.settings.artifacts, _checked(name)) as staged:
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
        name = _checked(manifest.name)
        sealed = directory.seal(staged, manifest)
        if policy is not None:
            directory.write_atomic(staged / directory.POLICY, policy)
        place = self.settings.artifacts / name / uuid.uuid4().hex[:12]
        place.parent.mkdir(parents=True, exist_ok=True)
        with directory.announced(place, self.settings.registry_uri):
            staged.rename(place)
            version = self._create_version(place, sealed, dict(tags or {}))
        return Artifact(path=place, manifest=sealed, version=version, policy=policy)

    def resolve(self, ref: str) -> Artifact:
        """The artifact of `name` (production, else the newest), `name@alias` or `name@3`, its files checked.

        Raises:
            ModelNotFound, VersionNotFound: with the names that exist.
            ArtifactInvalid: a file is missing, truncated or altered in size.
        """
        row = self._row(ref)
        path = self._path(row)
        recorded = row.tags.get(_TAG + "manifest_sha256")
        artifact = directory.open_artifact(path, version=int(row.version))
        if recorded != _digest(path / directory.MANIFEST):
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
        aliases = self._aliases(name)
        return [self._info(row, aliases) for row in self._rows(f"name='{name}'")]

    def models(self) -> list[ModelInfo]:
        """Every model that r1ray registered, by name."""
        rows: dict[str, list[Any]] = {}
        for row in self._rows(None):
            rows.setdefault(row.name, []).append(row)
        found = []
        for name in sorted(rows):
            aliases = self._aliases(name)
            versions = tuple(self._info(row, aliases) for row in rows[name])
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
            history = self._history(name, alias)
            if history[-1:] != [artifact.version]:
                history.append(artifact.version)
            self._point(name, alias, history)
        return artifact

    def rollback(self, name: str, alias: str = PRODUCTION) -> Artifact:
        """Point `alias` back at the version it named before the last promotion; may be repeated.

        Raises:
            VersionNotFound: there is no earlier promotion whose version still exists.
        """
        with self._exclusive():
            existing = {info.version for info in self.versions(name)}
            history = self._history(name, alias)
            current = history[-1] if history else None
            earlier = [version for version in history[:-1] if version in existing]
            while earlier and earlier[-1] == current:  # what lay between was deleted since
                earlier.pop()
            if not earlier:
                raise VersionNotFound(f"{name} has no earlier {alias} version to roll back to. Promote one: r1ray promote {name}@VERSION.")
            artifact = self.resolve(f"{name}@{earlier[-1]}")
            self._point(name, alias, earlier)
        return artifact

    def keep(self, name: str, num: int = 3) -> list[int]:
        """Delete the oldest versions beyond the newest `num`; gives their numbers.

        Stays: what an alias points at, and every base or parent of a version that stays, of any model.
        """
        with self._exclusive():
            everything = [info for model in self.models() for info in model.versions]
            own = [info for info in everything if info.name == _checked(name)]
            doomed = {info.ref for info in own[max(num, 0) :] if not info.aliases}
            doomed -= _ancestors([info for info in everything if info.ref not in doomed], everything)
            gone = [info for info in own if info.ref in doomed]
            for info in gone:
                self._client.delete_model_version(name, str(info.version))
                shutil.rmtree(info.path, ignore_errors=True)
        return sorted(info.version for info in gone)

    def attach_policy(self, ref: str, policy: SamplingPolicy) -> Artifact:
        """Put sampling settings beside the weights; readers see the old file or the new one."""
        artifact = self.resolve(ref)
        directory.write_atomic(artifact.path / directory.POLICY, policy)
        self._tag(artifact, {_TAG + "policy": policy.model_dump_json()})
        return self.resolve(artifact.ref)

    def annotate(self, ref: str, metrics: Mapping[str, float]) -> None:
        """Add evaluation metrics to the version; the manifest, written once, stays as it is."""
        artifact = self.resolve(ref)
        self._tag(artifact, {_METRIC + name: repr(float(value)) for name, value in metrics.items()})

    def record_verdict(self, ref: str, verdict: Verdict) -> None:
        """Put the gate's verdict on the version, in place of an earlier one."""
        self._tag(self.resolve(ref), {_GATE: verdict.model_dump_json()})

    def verdict(self, ref: str) -> Verdict | None:
        """The gate's last verdict on the version; None where it was never asked."""
        stored = self._row(self.resolve(ref).ref).tags.get(_GATE)
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

    @property
    def _client(self) -> MlflowClient:
        return client(self.settings.registry_uri)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Connect first: opening the store takes seconds that nobody else should wait for."""
        _ = self._client
        with exclusive(directory.directory_lock(self.settings.artifacts)):
            yield

    def _create_version(self, place: Path, manifest: Manifest, tags: dict[str, str]) -> int:
        from mlflow.exceptions import MlflowException

        run_id = tags.pop("run_id", None)
        record = {**tags, **_record(place, manifest)}
        # not a path: a server refuses local sources, and the same home may be mounted elsewhere tomorrow
        source = f"r1ray:/{manifest.name}/{place.name}"
        with self._exclusive():
            self._sweep()
            try:
                if not self._registered(manifest.name):
                    self._client.create_registered_model(manifest.name)
                row = self._client.create_model_version(manifest.name, source, run_id=run_id, tags=record)
            except MlflowException as error:
                raise RegistryError(f"MLflow refused {manifest.name}: {error}. See {self.settings.registry_uri}.") from error
        return int(row.version)

    def _sweep(self) -> None:
        """Remove what writers left that died between a directory's last move and its number; one that has a number stays."""
        for note, place in directory.abandoned(self.settings.artifacts, self.settings.registry_uri):
            if all(self._path(row) != place for row in self._rows(f"name='{place.parent.name}'")):
                _log.warning("removing %s: its writer died before it had a version number", place)
                shutil.rmtree(place, ignore_errors=True)
            note.unlink(missing_ok=True)

    def _row(self, ref: str) -> Any:
        name, at, wanted = ref.partition("@")
        aliases = self._aliases(name)
        rows = {int(row.version): row for row in self._rows(f"name='{name}'")}
        if not rows:
            raise VersionNotFound(f"{name} has no version. Register one, e.g. with jobs/finetune.py.")
        if not at:
            return rows[aliases.get(PRODUCTION, max(rows))]
        version = int(wanted) if wanted.isdecimal() else aliases.get(wanted, max(rows) if wanted == "latest" else -1)
        if version not in rows:
            known = ", ".join([*map(str, sorted(rows)), *sorted(aliases)])
            raise VersionNotFound(f"{name} has no version or alias {wanted!r}; it has {known}. See `r1ray models {name}`.")
        return rows[version]

    def _rows(self, query: str | None) -> list[Any]:
        """MLflow's version rows that are ours, newest first."""
        rows, token = [], None
        while True:
            page = self._client.search_model_versions(query, max_results=1000, page_token=token)
            rows += [row for row in page if _TAG + "path" in row.tags]
            if not (token := page.token):
                return sorted(rows, key=lambda row: -int(row.version))

    def _registered(self, name: str) -> Any | None:
        return next(iter(self._client.search_registered_models(f"name='{_checked(name)}'", max_results=1)), None)

    def _aliases(self, name: str) -> dict[str, int]:
        return {alias: int(version) for alias, version in self._model(name).aliases.items()}

    def _model(self, name: str) -> Any:
        if self._registered(name) is None:
            known = sorted(model.name for model in self._client.search_registered_models(max_results=20))
            raise ModelNotFound(
                f"No model {name!r} in {self.settings.registry_uri}; it has {', '.join(known) or 'none'}. See `r1ray models`."
            )
        return self._client.get_registered_model(name)

    def _history(self, name: str, alias: str) -> list[int]:
        """Versions that `alias` has pointed at, oldest first, the current one last even if MLflow's own UI moved it."""
        model = self._model(name)
        history: list[int] = json.loads(model.tags.get(_HISTORY + alias, "[]"))
        current = model.aliases.get(alias)
        if current is not None and history[-1:] != [int(current)]:
            history.append(int(current))
        return history

    def _point(self, name: str, alias: str, history: list[int]) -> None:
        self._client.set_registered_model_tag(name, _HISTORY + alias, json.dumps(history[-_LONGEST_HISTORY:]))
        self._client.set_registered_model_alias(name, alias, str(history[-1]))

    def _tag(self, artifact: Artifact, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(artifact.manifest.name, str(artifact.version), key, value)

    def _path(self, row: Any) -> Path:
        """Where the version lies: as recorded, or at the same place below this home when that was moved or mounted elsewhere."""
        recorded = Path(row.tags[_TAG + "path"])
        here = self.settings.artifacts / row.name / recorded.name
        return recorded if recorded.exists() or not here.exists() else here

    def _info(self, row: Any, aliases: Mapping[str, int]) -> VersionInfo:
        tags = {key.removeprefix(_TAG): value for key, value in row.tags.items() if key.startswith(_TAG)}
        return VersionInfo(
            name=row.name,
            version=int(row.version),
            kind=tags["kind"],
            created_at=tags["created_at"],
            path=self._path(row),
            weights_sha256=tags["weights_sha256"],
            data_hash=tags.get("data_hash"),
            base=tags.get("base"),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if version == int(row.version))),
            parents=tuple(json.loads(tags["parents"])),
            metrics={key.removeprefix("metric."): float(value) for key, value in tags.items() if key.startswith("metric.")},
        )


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidValue(f"{name!r} is no model name. Use at most 128 letters, digits, dots, dashes, underscores, e.g. bank-assistant.")
    return name


def _record(place: Path, manifest: Manifest) -> dict[str, str]:
    """The MLflow tags of a version: enough to list and compare without opening its directory."""
    optional = {"base": manifest.base, "base_sha256": manifest.base_sha256, "data_hash": manifest.data_hash}
    tags = {
        "path": str(place),
        "kind": manifest.kind,
        "family": manifest.family,
        "created_at": manifest.created_at,
        "weights_sha256": manifest.weights_sha256,
        "manifest_sha256": _digest(place / directory.MANIFEST),
        "parents": json.dumps(manifest.parents),
        **{key: value for key, value in optional.items() if value is not None},
    }
    metrics = {_METRIC + name: repr(float(value)) for name, value in manifest.metrics.items()}
    return {**{_TAG + key: value for key, value in tags.items()}, **metrics}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
