"""MLflow's rows of models and versions: what is noted on them, how a reference finds one, where an alias has pointed.

Takes names, references and manifests; gives rows, aliases and what a listing shows. Opens no artifact, moves no file and takes no lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from r1ray.errors import InvalidValue, ModelNotFound, RegistryError, VersionNotFound
from r1ray.observe.client import client
from r1ray.registry import directory
from r1ray.registry.listing import VersionInfo
from r1ray.settings import Settings
from r1ray.types import ArtifactKind, Manifest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

__all__ = ["PRODUCTION", "Rows", "checked", "measured", "noted"]

PRODUCTION = "production"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TAG = "r1ray."
_METRIC = "metric."
_HISTORY = _TAG + "history."
_LONGEST_HISTORY = 50


class Rows:
    """Cheap to make and to pickle: the connection is opened at the first call and shared within a process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def client(self) -> MlflowClient:
        return client(self.settings.registry_uri)

    def find(self, ref: str) -> ModelVersion:
        """The row of `name` (production, else the newest), `name@alias`, `name@latest` or `name@3`.

        Raises:
            ModelNotFound, VersionNotFound: with the names that exist.
        """
        name, at, wanted = ref.partition("@")
        aliases = self.aliases(name)
        rows = {int(row.version): row for row in self.of(name)}
        if not rows:
            raise VersionNotFound(f"{name} has no version. Register one, e.g. with jobs/finetune.py.")
        if not at:
            return rows[aliases.get(PRODUCTION, max(rows))]
        version = int(wanted) if wanted.isdecimal() else aliases.get(wanted, max(rows) if wanted == "latest" else -1)
        if version not in rows:
            known = ", ".join([*map(str, sorted(rows)), *sorted(aliases)])
            raise VersionNotFound(f"{name} has no version or alias {wanted!r}; it has {known}. See `r1ray models {name}`.")
        return rows[version]

    def of(self, name: str | None) -> list[ModelVersion]:
        """The versions that r1ray registered, newest first: of one model, or with None of all."""
        query = None if name is None else f"name='{name}'"
        rows, token = [], None
        while True:
            page = self.client.search_model_versions(query, max_results=1000, page_token=token)
            rows += [row for row in page if _TAG + "path" in row.tags]
            if not (token := page.token):
                return sorted(rows, key=lambda row: -int(row.version))

    def create(self, place: Path, manifest: Manifest, tags: Mapping[str, str]) -> int:
        """The number of a new version that lies at `place`; the tag `run_id` links it to its MLflow run.

        Raises:
            RegistryError: MLflow refused it.
        """
        from mlflow.exceptions import MlflowException

        own = {key: value for key, value in tags.items() if key != "run_id"}
        # not a path: a server refuses local sources, and the same home may be mounted elsewhere tomorrow
        source = f"r1ray:/{manifest.name}/{place.name}"
        try:
            if not self._registered(manifest.name):
                self.client.create_registered_model(manifest.name)
            row = self.client.create_model_version(
                manifest.name, source, run_id=tags.get("run_id"), tags={**own, **_tagged(_record(place, manifest))}
            )
        except MlflowException as error:
            raise RegistryError(f"MLflow refused {manifest.name}: {error}. See {self.settings.registry_uri}.") from error
        return int(row.version)

    def delete(self, name: str, version: int) -> None:
        """The row alone; its directory is the caller's."""
        self.client.delete_model_version(name, str(version))

    def note(self, name: str, version: int, notes: Mapping[str, str]) -> None:
        """Put `notes` on a version, over earlier ones of the same key; `noted` reads them."""
        for key, value in _tagged(notes).items():
            self.client.set_model_version_tag(name, str(version), key, value)

    def aliases(self, name: str) -> dict[str, int]:
        return {alias: int(version) for alias, version in self._model(name).aliases.items()}

    def history(self, name: str, alias: str) -> list[int]:
        """Versions that `alias` has pointed at, oldest first, the current one last even if MLflow's own UI moved it."""
        model = self._model(name)
        history: list[int] = json.loads(model.tags.get(_HISTORY + alias, "[]"))
        current = model.aliases.get(alias)
        if current is not None and history[-1:] != [int(current)]:
            history.append(int(current))
        return history

    def point(self, name: str, alias: str, history: list[int]) -> None:
        """At the last version of `history`, which is kept with it."""
        self.client.set_registered_model_tag(name, _HISTORY + alias, json.dumps(history[-_LONGEST_HISTORY:]))
        self.client.set_registered_model_alias(name, alias, str(history[-1]))

    def place(self, row: ModelVersion) -> Path:
        """Where the version lies: as recorded, or at the same place below this home when that was moved or mounted elsewhere."""
        recorded = Path(noted(row)["path"])
        here = self.settings.artifacts / row.name / recorded.name
        return recorded if recorded.exists() or not here.exists() else here

    def listed(self, row: ModelVersion, aliases: Mapping[str, int]) -> VersionInfo:
        notes = noted(row)
        return VersionInfo(
            name=row.name,
            version=int(row.version),
            kind=cast(ArtifactKind, notes["kind"]),  # as `create` wrote it
            created_at=notes["created_at"],
            path=self.place(row),
            weights_sha256=notes["weights_sha256"],
            data_hash=notes.get("data_hash"),
            base=notes.get("base"),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if version == int(row.version))),
            parents=tuple(json.loads(notes["parents"])),
            metrics={key.removeprefix(_METRIC): float(value) for key, value in notes.items() if key.startswith(_METRIC)},
        )

    def _registered(self, name: str) -> RegisteredModel | None:
        return next(iter(self.client.search_registered_models(f"name='{checked(name)}'", max_results=1)), None)

    def _model(self, name: str) -> RegisteredModel:
        if self._registered(name) is None:
            known = sorted(model.name for model in self.client.search_registered_models(max_results=20))
            raise ModelNotFound(
                f"No model {name!r} in {self.settings.registry_uri}; it has {', '.join(known) or 'none'}. See `r1ray models`."
            )
        return self.client.get_registered_model(name)


def checked(name: str) -> str:
    """Raises InvalidValue where `name` could not be a directory of the artifacts."""
    if not _NAME.fullmatch(name):
        raise InvalidValue(f"{name!r} is no model name. Use at most 128 letters, digits, dots, dashes, underscores, e.g. bank-assistant.")
    return name


def noted(row: ModelVersion) -> dict[str, str]:
    """What r1ray has put on a version."""
    return {key.removeprefix(_TAG): value for key, value in row.tags.items() if key.startswith(_TAG)}


def measured(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics as notes."""
    return {_METRIC + name: repr(float(value)) for name, value in metrics.items()}


def _tagged(notes: Mapping[str, str]) -> dict[str, str]:
    return {_TAG + key: value for key, value in notes.items()}


def _record(place: Path, manifest: Manifest) -> dict[str, str]:
    """The notes of a new version: enough to list and compare without opening its directory."""
    optional = {"base": manifest.base, "base_sha256": manifest.base_sha256, "data_hash": manifest.data_hash}
    return {
        "path": str(place),
        "kind": manifest.kind,
        "family": manifest.family,
        "created_at": manifest.created_at,
        "weights_sha256": manifest.weights_sha256,
        "manifest_sha256": directory.manifest_sha256(place),
        "parents": json.dumps(manifest.parents),
        **{key: value for key, value in optional.items() if value is not None},
        **measured(manifest.metrics),
    }
