"""What a calibration found, kept per weights and kind of machine, and what `dtype: auto` makes of it. Measures nothing itself."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1ray.engine.hardware import physical_cores
from r1ray.settings import Settings
from r1ray.types import Artifact

__all__ = ["LARGEST_LOSS", "Calibration", "choose", "load_calibration", "store_calibration"]

log = logging.getLogger(__name__)

LARGEST_LOSS = 0.015  # seeds: the accuracy that quantisation may cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Per precision: perplexity, the share of first choices that are float32's, tokens/s by streams; what was chosen and why."""

    num_tokens: int
    perplexity: Mapping[str, float]
    agreement: Mapping[str, float]
    tokens_per_s: Mapping[str, Mapping[str, float]]
    chosen: str
    reason: str


def load_calibration(artifact: Artifact, settings: Settings) -> Calibration | None:
    """What `calibrate` found for these weights on this kind of machine; None when it never ran.

    For an adapter it is its base's finding without int4: merged weights no longer lie where the base's codes did.
    """
    try:
        found = Calibration(**json.loads(_file(artifact, settings).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("the calibration of %s cannot be read (%s); calibrate again", artifact.ref, error)
        return None
    if artifact.manifest.base_sha256 is None or found.chosen != "int4":
        return found
    chosen, reason = choose({name: value for name, value in found.perplexity.items() if name != "int4"}, found.tokens_per_s)
    return replace(found, chosen=chosen, reason=f"{reason}; int4 is not for merged adapters")


def choose(perplexity: Mapping[str, float], speed: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The fastest at the batch sizes measured (geometric mean) among those within the bound, and why."""
    losses = {precision: value / perplexity["float32"] - 1 for precision, value in perplexity.items()}
    within = [precision for precision, loss in losses.items() if loss <= LARGEST_LOSS]
    mean = {precision: math.prod(speed[precision].values()) ** (1 / len(speed[precision])) for precision in within}
    chosen = max(within, key=lambda precision: mean[precision])
    out = [f"{precision} loses {losses[precision]:+.1%}" for precision in losses if precision not in within]
    return chosen, "; ".join([f"{mean[chosen]:.0f} tokens/s, perplexity {losses[chosen]:+.2%} to float32", *out])


def store_calibration(artifact: Artifact, settings: Settings, found: Calibration) -> Path:
    """Whole or not at all."""
    file = _file(artifact, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".partial")
    written.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    written.replace(file)
    return file


def _file(artifact: Artifact, settings: Settings) -> Path:
    """A base's finding serves its adapters."""
    weights = artifact.manifest.base_sha256 or artifact.manifest.weights_sha256
    return settings.cache / "calibration" / f"{weights[:16]}-{_machine()}.json"


def _machine() -> str:
    """Processor and cores, such as "AMD-EPYC-9R14-2-cores": a host name changes with every pod."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{model} {physical_cores()} cores").strip("-")
