"""Which kinds of version an engine type runs; asked before anything is deployed and again when it is loaded. Imports no torch."""

from __future__ import annotations

from r1ray.engine.config import EngineConfig
from r1ray.errors import UnsupportedModel
from r1ray.types import Artifact

__all__ = ["check_kind"]


def check_kind(artifact: Artifact, config: EngineConfig) -> None:
    """Raises UnsupportedModel: a model that writes nothing, an ONNX export under an engine of weights, or weights under ONNX Runtime."""
    kind = artifact.manifest.kind
    if kind == "reward":
        raise UnsupportedModel(f"{artifact.ref} is a reward model: it scores answers and writes none. Name the version of a chat model.")
    if config.type == "onnx" and kind != "onnx":
        raise UnsupportedModel(
            f"{artifact.ref} is of kind {kind}; engine.type=onnx runs exports. Run jobs/export_onnx.py on it, or set engine.type=torch."
        )
    if config.type in ("torch", "vllm") and kind == "onnx":
        raise UnsupportedModel(f"{artifact.ref} is an ONNX export; engine.type={config.type} runs weights. Set engine.type=onnx.")
