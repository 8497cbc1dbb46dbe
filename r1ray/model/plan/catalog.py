"""Which model is meant: R1 and its distills by name (their published configs ship with r1ray), or any directory with a config.json.

Reads configs, never weights. Knows nothing about what the sizes in them cost.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1ray.errors import ModelNotFound, UnsupportedModel
from r1ray.model.plan.shape import ModelShape, shape_of

__all__ = ["PlannedModel", "find", "names"]

CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A name for tables and the shape behind it."""

    name: str
    shape: ModelShape


def names() -> list[str]:
    """The models whose configs ship with r1ray, smallest first."""
    sizes = {path.stem: shape_of(_read(path)).parameters.total for path in CONFIGS.glob("*.json")}
    return sorted(sizes, key=lambda name: sizes[name])


def find(name_or_dir: str) -> PlannedModel:
    """`r1-distill-qwen-7b`, `deepseek-ai/DeepSeek-R1-Distill-Qwen-7B`, a directory or a config.json.

    Raises:
        ModelNotFound: neither a known name nor a path with a config; names the nearest.
        UnsupportedModel: the config is not one whose arithmetic is known.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return PlannedModel(path.name, shape_of(_read(path / "config.json")))
    if path.is_file():
        return PlannedModel(path.stem if path.stem != "config" else path.parent.name, shape_of(_read(path)))
    wanted = name_or_dir.rsplit("/", 1)[-1].lower().removeprefix("deepseek-")
    file = CONFIGS / f"{wanted}.json"
    if file.is_file():
        return PlannedModel(wanted, shape_of(_read(file)))
    near = difflib.get_close_matches(wanted, names(), n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ModelNotFound(f"No model {name_or_dir!r}.{hint} Give a directory with a config.json or one of: {', '.join(names())}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} is no readable JSON: {error}. Give the model's own config.json.") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} holds a {type(content).__name__}, not a model's config. Give the model's own config.json.")
    return content
