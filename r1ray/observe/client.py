"""The one door to MLflow: a quiet client per URI, its database created once however many processes start together.

Takes any MLflow URI (SQLite, PostgreSQL, `http://` server) and gives MLflow's own client. Knows neither models nor runs.
MLflow is imported at the first call, because its import alone takes seconds.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["client", "exclusive", "silence"]

_SERVER_TIMEOUT_S = 10.0
_SQLITE = "sqlite:///"


def silence() -> None:
    """No telemetry, no schema-migration log: called before every import of MLflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@functools.cache
def client(uri: str) -> MlflowClient:
    """MLflow's client for `uri`, connected: a missing SQLite database has its tables when this returns.

    Raises:
        RegistryError: the server does not answer or the database cannot be opened.
    """
    silence()
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    silence()  # MLflow configures its loggers while it is imported
    try:
        if uri.startswith(_SQLITE):
            _create_database(Path(uri.removeprefix(_SQLITE).partition("?")[0]).absolute())
        opened = MlflowClient(tracking_uri=uri, registry_uri=uri)  # connects
        opened.search_experiments(max_results=1)
        opened.search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise RegistryError(f"MLflow cannot be opened at {uri}: {error}. Mend the store or set R1RAY_REGISTRY to another URI.") from error
    return opened


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` (made when missing) across processes; the kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _create_database(path: Path) -> None:
    """Processes that start together wait here for the first; one that is killed half-way leaves no half database."""
    if path.exists():
        return
    with exclusive(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        fresh = path.with_name(f".{path.name}.fresh")
        fresh.write_bytes(_empty_database())
        fresh.replace(path)


@functools.cache
def _empty_database() -> bytes:
    """MLflow's tables, made by its dozens of migrations: in memory-backed storage, since each of them waits for the disk."""
    from mlflow.tracking import MlflowClient

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="r1ray-", dir=memory if os.access(memory, os.W_OK) else None) as directory:
        file = Path(directory) / "mlflow.db"
        MlflowClient(tracking_uri=f"{_SQLITE}{file}").search_experiments(max_results=1)
        return file.read_bytes()


def _check_server(uri: str) -> None:
    """MLflow itself would retry for minutes before it says that nobody listens."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SERVER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # somebody answers; what it refuses, MLflow's own call reports
    except OSError as error:
        raise RegistryError(f"No MLflow server answers at {uri}: {error}. Start it, or unset R1RAY_REGISTRY to use SQLite.") from error
