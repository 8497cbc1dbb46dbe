"""One MLflow run: parameters, metrics over steps, files; ends FINISHED, FAILED or KILLED as the block does.

    with Run("finetune", "bank-assistant", settings=settings) as run:
        run.log_params(config.model_dump())
        run.log_metrics({"loss": 1.2}, step=10)

Measures, never decides: a metric that cannot be written costs a warning, not the training. Knows no job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from r1ray.errors import RegistryError
from r1ray.observe.client import client
from r1ray.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["Run"]

_LONGEST_PARAM = 500
_PARAMS_PER_CALL = 100
_log = logging.getLogger(__name__)


class Run:
    """Context manager over one run; `id` is set once entered.

    `parent_run_id` nests it below a sweep's run. `resume_run_id` continues a run, appending to its metrics.
    """

    def __init__(
        self,
        experiment: str,
        name: str,
        *,
        settings: Settings | None = None,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
    ) -> None:
        self.experiment = experiment
        self.name = name
        self.settings = settings or Settings()
        self.id = ""
        self._parent_run_id = parent_run_id
        self._resume_run_id = resume_run_id
        self._has_warned = False

    def __enter__(self) -> Self:
        self.id = (self._resumed() if self._resume_run_id else None) or self._created()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from mlflow.exceptions import MlflowException

        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            if error is not None:
                self._client.set_tag(self.id, "r1ray.error", f"{type(error).__name__}: {error}"[:5000])
            self._client.set_terminated(self.id, status)
        except MlflowException as failure:
            _log.warning("run %s could not be marked %s: %s", self.id, status, failure)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names. MLflow's parameters are written once: on a resumed run a changed value warns."""
        from mlflow.entities import Param

        known = self._client.get_run(self.id).data.params
        flat = {name: str(value)[:_LONGEST_PARAM] for name, value in _flatten(params)}
        if changed := sorted(name for name, value in flat.items() if name in known and known[name] != value):
            _log.warning("run %s keeps its first values of %s", self.id, ", ".join(changed))
        fresh = [Param(name, value) for name, value in flat.items() if name not in known]
        for start in range(0, len(fresh), _PARAMS_PER_CALL):
            self._client.log_batch(self.id, params=fresh[start : start + _PARAMS_PER_CALL])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One point per metric, at `step` (0 when absent)."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now_ms = int(time.time() * 1000)
        points = [Metric(name, float(value), now_ms, step or 0) for name, value in metrics.items()]
        try:
            self._client.log_batch(self.id, metrics=points)
        except MlflowException as error:
            if not self._has_warned:
                _log.warning("metrics of run %s are not recorded: %s", self.id, error)
            self._has_warned = True

    def log_dict(self, content: Mapping[str, Any] | list[Any], file: str) -> None:
        """`content` as an artifact of the run; the ending says JSON or YAML."""
        self._client.log_dict(self.id, content, file)

    def log_artifact(self, path: Path) -> None:
        """A file, or a directory with all it holds. For small things: weights belong in the registry."""
        if path.is_dir():
            self._client.log_artifacts(self.id, str(path), path.name)
        else:
            self._client.log_artifact(self.id, str(path))

    @property
    def _client(self) -> MlflowClient:
        return client(self.settings.registry_uri)

    def _resumed(self) -> str | None:
        """The run to continue, or None when the store does not know it: lost bookkeeping must not stop a training."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(self._resume_run_id, status="RUNNING")
        except MlflowException as error:
            _log.warning("run %s cannot be resumed, a new one starts: %s", self._resume_run_id, error)
            return None
        return self._resume_run_id

    def _created(self) -> str:
        from mlflow.exceptions import MlflowException

        tags = {"mlflow.parentRunId": self._parent_run_id} if self._parent_run_id else {}
        try:
            run = self._client.create_run(self._experiment_id(), run_name=self.name, tags=tags)
        except MlflowException as error:
            raise RegistryError(f"MLflow at {self.settings.registry_uri} cannot start a run of {self.experiment!r}: {error}.") from error
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(self.experiment)) is not None:
            return str(found.experiment_id)
        # SQLite's default place for artifacts is the working directory; a server has its own
        is_local = self.settings.registry_uri.startswith("sqlite:")
        location = (self.settings.home / "mlruns" / self.experiment).as_uri() if is_local else None
        try:
            return str(self._client.create_experiment(self.experiment, artifact_location=location))
        except MlflowException:
            if (found := self._client.get_experiment_by_name(self.experiment)) is None:
                raise
            return str(found.experiment_id)  # another process was faster


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
