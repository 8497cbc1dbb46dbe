"""What the gate said about a version: kept as a tag on it, so that whoever promotes it sees it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Verdict"]


class Verdict(BaseModel):
    """The newest one counts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    passed: bool = Field(description="Whether every check passed.")
    against: str | None = Field(default=None, description="The version that it was compared with.")
    failed: tuple[str, ...] = Field(default=(), description="Checks that failed, by name.")
    at: str = Field(description="UTC time, ISO 8601.")
    report: str = Field(default="", description="The JSON file with every figure.")
