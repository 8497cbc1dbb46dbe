"""An adapter and its base as one version of full weights, to go on training from: `r1ray merge intents`.

What serving does in memory, kept: the way from supervised fine-tuning to preferences or rewards. Knows no training.
"""

from __future__ import annotations

from datetime import UTC, datetime

from r1ray.errors import AdapterMismatch
from r1ray.model import template
from r1ray.model.checkpoint import num_parameters, weight_files
from r1ray.model.load import merge_adapter
from r1ray.registry import Registry, weights_sha256
from r1ray.types import Artifact

__all__ = ["merged_version"]


def merged_version(ref: str, registry: Registry, name: str | None = None) -> Artifact:
    """Merge the adapter `ref`, compare it with the unmerged one, register the weights as `name` (default: the adapter's with -merged).

    Raises:
        AdapterMismatch: `ref` is no adapter, or merged it answers differently; nothing is registered.
        UnsupportedModel: a soft prompt or a reward model, which change no weights.
    """
    adapter = registry.resolve(ref)
    shape = adapter.manifest
    if shape.kind == "full":
        raise AdapterMismatch(f"{adapter.ref} is no adapter: its weights are whole already. Use it as it is.")
    name = name or f"{shape.name}-merged"
    with registry.staging(name) as staged:
        merge_adapter(adapter, staged, registry)
        card = f"# {name}\n\nThe weights of {shape.base} with the adapter {adapter.ref} merged into them by r1ray.\n"
        (staged / "README.md").write_text(card, encoding="utf-8")
        manifest = shape.model_copy(
            update={
                "name": name,
                "kind": "full",
                "base": None,
                "base_sha256": None,
                "weights_sha256": weights_sha256(staged),
                "template": template.write(template.read(adapter), staged),
                "num_parameters": num_parameters(weight_files(staged)),
                "metrics": {},
                "parents": (adapter.ref,),
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        return registry.register(staged, manifest, policy=adapter.policy)
