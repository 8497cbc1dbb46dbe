"""The last checkpoint -> a registered version: weights taken, tokenizer and template pair copied from the base, reopened and checked.

Knows no Ray: it reads a checkpoint directory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from r1ray.errors import TrainingError
from r1ray.model import template
from r1ray.model.checkpoint import HEAD, INDEX, num_parameters, read_json, tensor_shapes, weight_files
from r1ray.registry import MANIFEST, POLICY, Registry, weights_sha256
from r1ray.train.card import model_card
from r1ray.train.config import FinetuneConfig
from r1ray.train.consolidate import with_weights
from r1ray.types import Artifact, Manifest

__all__ = ["Result", "export"]

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_TRAINER_FILES = ("README.md", "adapter_*", "*.safetensors", INDEX, "chat_template*", MANIFEST, POLICY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished training, before it has a version. `dtype` is what it trained in, and what full weights are stored in."""

    checkpoint: Path
    dtype: str
    config: FinetuneConfig
    base: Artifact
    data_hash: str
    metrics: Mapping[str, float]
    run_id: str


def export(result: Result, registry: Registry) -> Artifact:
    """Register the trained weights.

    Raises:
        TrainingError: a tensor is missing, not finite, or a LoRA update that never moved from zero.
    """
    config, base = result.config, result.base
    is_adapter, is_reward = config.train.method != "full", config.train.objective == "reward"
    with registry.staging(config.name) as staged:
        _copy_companions(base.path, staged, with_config=not is_adapter)
        weights = _take_adapter(result, staged) if is_adapter else _take_full(result, staged)
        check_weights(weights, base.path, is_adapter=is_adapter, is_reward=is_reward, unmoved=_why_unmoved(result))
        manifest = Manifest(
            name=config.name,
            kind="reward" if is_reward else "adapter" if is_adapter else "full",
            family=base.manifest.family,
            base=base.ref if is_adapter else None,
            base_sha256=base.manifest.weights_sha256 if is_adapter else None,
            weights_sha256=weights_sha256(staged),
            template=template.write(template.read(base), staged),
            context_length=base.manifest.context_length,
            num_parameters=num_parameters(weights),
            data_hash=result.data_hash,
            config=config.model_dump(mode="json"),
            metrics=dict(result.metrics),
            parents=(base.ref,),
            collection=config.collection,
            system_prompt=config.data.system_prompt,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (staged / "README.md").write_text(model_card(manifest), encoding="utf-8")
        return registry.register(staged, manifest, tags={"run_id": result.run_id})


def check_weights(files: Sequence[Path], base: Path, *, is_adapter: bool, is_reward: bool = False, unmoved: str = "") -> None:
    """Reopen what was written: as many tensors as there should be, all finite, an adapter that has moved.

    A reward model has a head for one number, in place of the one for the next token where that has weights of its own. `unmoved`: what
    to say of an adapter that no step has changed.

    Raises:
        TrainingError: naming the first offending tensor.
    """
    shapes = tensor_shapes(files)
    stored = tensor_shapes(weight_files(base))
    wanted = (1 if is_adapter else len(stored)) + is_reward * (1 - (not is_adapter and "lm_head.weight" in stored))
    if len(shapes) < wanted:
        raise TrainingError(
            f"{files[0].parent} holds {len(shapes)} tensors instead of {wanted}: the save was incomplete. This is a defect."
        )
    cut = next((name for name, shape in stored.items() if not is_adapter and shapes.get(name, shape) != shape), None)
    if cut is not None:
        raise TrainingError(
            f"{cut} has shape {shapes[cut]}, in the base {stored[cut]}: parts of a split model were not put together. This is a defect."
        )
    if is_reward and not any(name.endswith(HEAD) for name in shapes):
        raise TrainingError(f"{files[0].parent} holds no {HEAD}, the head of a reward model: the save was incomplete. This is a defect.")
    norms = dict(_norms(files))
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise TrainingError(
                f"{name} has norm {norm:g} after training: it diverged. Lower train.learning_rate, set train.restart=true and train again."
            )
    grown = [norm for name, norm in norms.items() if ".lora_B" in name]
    if grown and not any(grown):
        raise TrainingError(f"All {len(grown)} lora_B matrices are zero, as before training: no step has changed the adapter. {unmoved}")
    for name, norm in norms.items():
        if norm == 0 and (".lora_" in name or name.endswith(HEAD)):
            raise TrainingError(
                f"{name} has norm 0 after training, where others have moved: it was not saved or had no gradient. This is a defect."
            )


def _norms(files: Sequence[Path]) -> Iterator[tuple[str, float]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, float(opened.get_tensor(name).float().norm())


def _why_unmoved(result: Result) -> str:
    """The ways in which every gradient of a training can be zero, and what helps."""
    if result.config.train.objective == "grpo":
        return (
            "In every step the answers of a group got equal rewards (undecided 1 in the job log). Raise train.grpo.temperature or "
            "train.grpo.num_generations, or add a reward of degrees (overlap, length), set train.restart=true and train again."
        )
    if result.dtype == "float16":
        return (
            "In float16 the first steps are left out while the scale of the loss is sought; there were no others. Train more steps with "
            "train.restart=true, or set train.dtype=bfloat16 where the GPUs have it."
        )
    return "Every gradient was zero, or too small to be kept. Raise train.learning_rate, set train.restart=true and train again."


def _take_adapter(result: Result, staged: Path) -> list[Path]:
    for name in _ADAPTER:
        shutil.copyfile(result.checkpoint / name, staged / name)
    settings = {**read_json(staged / _ADAPTER[1]), "base_model_name_or_path": result.base.ref}
    if "tokenizer_name_or_path" in settings:  # of a soft prompt that began as a text
        settings["tokenizer_name_or_path"] = result.base.ref
    (staged / _ADAPTER[1]).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    return [staged / _ADAPTER[0]]


def _take_full(result: Result, staged: Path) -> list[Path]:
    shape = result.checkpoint if result.config.train.objective == "reward" else result.base.path
    for file in [*with_weights(result.checkpoint, result.dtype), shape / "config.json"]:
        shutil.copyfile(file, staged / file.name)
    if (index := result.checkpoint / INDEX).is_file():
        shutil.copyfile(index, staged / INDEX)
    return weight_files(staged)


def _copy_companions(base: Path, staged: Path, *, with_config: bool) -> None:
    """Tokenizer, terms and, beside full weights, the configs."""
    left_out = {path.name for pattern in _TRAINER_FILES for path in base.glob(pattern)}
    if not with_config:
        left_out |= {"config.json", "generation_config.json"}
    for file in base.iterdir():
        if file.is_file() and file.name not in left_out:
            shutil.copyfile(file, staged / file.name)
