"""The model card of a trained version: README.md in Hugging Face's form, so that the directory explains itself wherever it is copied.

Written from what the manifest holds; knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1ray.types import Manifest

__all__ = ["model_card"]

_WHAT = {
    "full": "All weights were trained.",
    "adapter": "An adapter: it needs the base, with exactly the weights named below.",
    "reward": "A reward model: it scores answers and generates none.",
}


def model_card(manifest: Manifest) -> str:
    """Markdown with a YAML head (base_model, tags, metrics), data, settings, metrics and lineage."""
    from huggingface_hub import ModelCardData

    train: Mapping[str, Any] = manifest.config.get("train", {})
    data: Mapping[str, Any] = manifest.config.get("data", {})
    head = ModelCardData(
        base_model=manifest.parents[0].partition("@")[0] if manifest.parents else None,
        library_name="peft" if manifest.kind == "adapter" else "transformers",
        tags=["r1ray", str(train.get("objective", "sft")), str(train.get("method", "full"))],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {manifest.name}",
        f"{_WHAT.get(manifest.kind, '')} Made by r1ray on {manifest.created_at} from {', '.join(manifest.parents) or 'nothing'}.",
        "## Use",
        f"    r1ray promote {manifest.name}@VERSION\n    serve run serve_config.yaml",
        "Prompts must go through the chat template in this directory; its training twin carries the marks of what was learnt.",
        "## Data",
        _table({"file": data.get("path"), "format": data.get("format"), "sha256 of the rows": manifest.data_hash}),
        *([f"Trained under the system message: {manifest.system_prompt}"] if manifest.system_prompt else []),
        "## Metrics",
        _table({name: f"{value:.4g}" for name, value in sorted(manifest.metrics.items())}),
        "## Settings",
        _table(_settings(train)),
        "## Lineage",
        _table(
            {
                "parents": ", ".join(manifest.parents),
                "base": manifest.base,
                "sha256 of the base": manifest.base_sha256,
                "sha256 of these weights": manifest.weights_sha256,
                "parameters": f"{manifest.num_parameters:,}",
                "context": f"{manifest.context_length} tokens",
            }
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(train: Mapping[str, Any]) -> dict[str, Any]:
    """What was in force: the blocks of other methods and objectives are left out."""
    blocks = {"lora": "lora", "prompt": "prompt", "prefix": "prompt"}
    mine = {blocks.get(str(train.get("method"))), str(train.get("objective"))}
    flat: dict[str, Any] = {}
    for name, value in train.items():
        if not isinstance(value, Mapping):
            flat[name] = value
        elif name in mine or name == "parallelism":
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    """Two columns; an empty value leaves its row out, a bar would end the cell."""
    shown = [(name, str(value).replace("|", "\\|")) for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown)]) if shown else ""
