"""Where things live on this machine: home directory, registry, caches, cluster. `R1RAY_*` environment variables win.

Settings say where, a job's Config says what: the same config gives the same model in any home.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings"]


class Settings(BaseSettings):
    """Read anew by every `Settings()`, so that a process that changes its environment sees the change."""

    model_config = SettingsConfigDict(env_prefix="R1RAY_", frozen=True, extra="ignore")

    home: Path = Field(default=Path("~/.r1ray"), description="All local state: registry, artifacts, checkpoints, indexes, caches.")
    registry: str | None = Field(default=None, description="MLflow tracking and registry URI; SQLite in home when absent.")
    require_gate: bool = Field(default=False, description="Refuse to promote a version that jobs/gate.py has not passed.")
    ray_address: str | None = Field(default=None, description="Ray cluster to join; RAY_ADDRESS or a local one when absent.")

    def model_post_init(self, _context: object) -> None:
        object.__setattr__(self, "home", self.home.expanduser().absolute())

    def locate(self, path: Path) -> Path:
        """Where a path of a config is: as given, or below home when only that exists (a submitted job runs in a copy of the tree)."""
        below_home = self.home / path
        return below_home if not path.expanduser().exists() and below_home.exists() else path.expanduser()

    def place(self, path: Path) -> Path:
        """Where a file that a config names is written: relative ones below home, since a submitted job's directory ends with it."""
        return self.home / path.expanduser()

    @property
    def registry_uri(self) -> str:
        """The MLflow URI in force."""
        return self.registry or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Complete artifacts, one directory each; versions of the registry point here."""
        return self.home / "artifacts"

    @property
    def checkpoints(self) -> Path:
        """Ray Train's and Tune's storage path: one directory per run."""
        return self.home / "checkpoints"

    @property
    def indexes(self) -> Path:
        """LanceDB directories, one per retrieval collection."""
        return self.home / "indexes"

    @property
    def cache(self) -> Path:
        """What can be deleted at any time: tokenised data, converted GGUF files."""
        return self.home / "cache"
