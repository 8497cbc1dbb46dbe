"""What a calibration found, kept per weights and machine, so that `dtype: auto` can look it up. Measures nothing itself."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from r1ray.settings import Settings
from r1ray.types import Artifact

__all__ = ["Calibration", "load_calibration", "store_calibration"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`tokens_per_s[precision][streams]`, `perplexity[precision]`; `chosen` and why."""

    num_tokens: int
    perplexity: Mapping[str, float]
    tokens_per_s: Mapping[str, Mapping[str, float]]
    chosen: str
    reason: str


def load_calibration(artifact: Artifact, settings: Settings) -> Calibration | None:
    """What `calibrate` found for these weights on this kind of machine; None when it never ran."""
    try:
        return Calibration(**json.loads(_file(artifact, settings).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("the calibration of %s cannot be read (%s); calibrate again", artifact.ref, error)
        return None


def store_calibration(artifact: Artifact, settings: Settings, found: Calibration) -> Path:
    """Whole or not at all."""
    file = _file(artifact, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".partial")
    written.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    written.replace(file)
    return file


def _file(artifact: Artifact, settings: Settings) -> Path:
    """An adapter is held in the precision of its base: its own update is merged before rounding."""
    weights = artifact.manifest.base_sha256 or artifact.manifest.weights_sha256
    return settings.cache / "calibration" / f"{weights[:16]}-{platform.node()}.json"
