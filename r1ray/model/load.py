"""An artifact into memory: tokenizer, model, an adapter merged into its base.

Merging happens layer by layer in float32 on un-quantised weights, then the layer is cast: at no time are there two copies of the
model. Knows no training loop and no engine.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from r1ray.errors import AdapterMismatch, ArtifactInvalid, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import read_json, tensor_shapes, weight_files
from r1ray.model.fp8 import fp8_of
from r1ray.registry import MANIFEST, POLICY, Registry
from r1ray.types import Artifact

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Dtype", "base_of", "choose_dtype", "end_token_id", "load_model", "load_tokenizer", "merge_adapter", "training_tokenizer"]

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

# Relative error of the logits that rounding may cause. An adapter put on the wrong weights is wrong by far more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.06, "float16": 0.02}
_log = logging.getLogger(__name__)


def load_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """The tokenizer with the artifact's template for generation."""
    return _tokenizer(artifact, template.read(artifact).infer)


def end_token_id(artifact: Artifact) -> int | None:
    """The tokenizer's end-of-text id, from its files where they say it: loading a tokenizer takes a second of imports."""
    settings, words = artifact.path / "tokenizer_config.json", artifact.path / "tokenizer.json"
    if settings.is_file() and words.is_file():
        token = read_json(settings).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        added = {entry.get("content"): entry.get("id") for entry in read_json(words).get("added_tokens", [])}
        if isinstance(found := added.get(content), int):
            return found
    found = load_tokenizer(artifact).eos_token_id
    return found if isinstance(found, int) else None


def training_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """The tokenizer with the training twin, for `template.training_ids` and for TRL."""
    return _tokenizer(artifact, template.read(artifact).train)


def choose_dtype(device: str = "cpu") -> tuple[torch.dtype, str]:
    """(dtype, reason) for `auto`: bfloat16 where the hardware multiplies it, else float32."""
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bfloat16") if native else (torch.float32, "the GPU has no bfloat16")
    for flag, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        if getattr(torch.cpu, flag, bool)():
            return torch.bfloat16, f"the CPU has {name}"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def load_model(
    artifact: Artifact, *, registry: Registry, dtype: Dtype = "auto", device: str = "cpu", merge: bool = True
) -> PreTrainedModel:
    """The model in evaluation mode.

    Args:
        artifact: Full weights or an adapter, whose base is then loaded too.
        registry: Where an adapter's base is looked up.
        dtype: `auto` takes what the device is fast in.
        device: torch device; full weights are read straight to it, without a copy in main memory.
        merge: Put an adapter's update into the weights; False gives a PeftModel that keeps both apart.

    Raises:
        AdapterMismatch: the adapter's base has other weights than it was trained on.
        ArtifactInvalid: a tensor that the architecture needs is not in the files.
    """
    import torch

    wanted = _dtype(dtype, device)
    if artifact.manifest.kind == "adapter":
        base = base_of(artifact, registry)
        # Unmerged weights stay as stored until each layer has taken its update in float32.
        adapted = _with_adapter(_read_weights(base, None if merge else wanted), artifact)
        model = _merged(adapted, wanted) if merge else adapted
    else:
        model = _read_weights(artifact, wanted, device)
    return model.to(torch.device(device)).eval()


def base_of(artifact: Artifact, registry: Registry) -> Artifact:
    """The base that an adapter was trained on; a reward model's adapter too.

    Raises:
        AdapterMismatch: `artifact` is no adapter, or its base now has other weights.
    """
    manifest = artifact.manifest
    if manifest.kind not in ("adapter", "reward") or manifest.base is None:
        raise AdapterMismatch(f"{artifact.ref} is of kind {manifest.kind}: it stands on no base. Use it as it is.")
    base = registry.resolve(manifest.base)
    if base.manifest.weights_sha256 != manifest.base_sha256:
        raise AdapterMismatch(
            f"{artifact.ref} was trained on {manifest.base} with weights {(manifest.base_sha256 or 'unknown')[:12]}; "
            f"that version now has {base.manifest.weights_sha256[:12]}. Import the original base, or train the adapter again."
        )
    return base


def merge_adapter(artifact: Artifact, out_dir: Path, registry: Registry) -> None:
    """Write base plus adapter as a full model directory, with tokenizer and template pair, in the base's stored dtype.

    The result is reopened and compared with the adapter model: tensors, finite values and the logits of a prompt.

    Raises:
        AdapterMismatch: the merged model answers differently; nothing is left in `out_dir`.
    """
    if artifact.manifest.kind == "reward":
        raise UnsupportedModel(f"{artifact.ref} is a reward model: its head has no place in the base. Use it as it is.")
    base = base_of(artifact, registry)
    adapted = _with_adapter(_read_weights(base, None), artifact).eval()
    probe = _probe(artifact)
    expected = adapted(probe).logits.detach().float()
    merged = _merged(adapted, adapted.dtype)
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        merged.save_pretrained(out_dir)
        del adapted, merged
        _copy_companions(artifact, out_dir)
        _verify(out_dir, base, probe, expected)
    except BaseException:
        shutil.rmtree(out_dir, ignore_errors=True)
        raise


def _tokenizer(artifact: Artifact, chat_template: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    tokenizer.chat_template = chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dtype(dtype: Dtype, device: str) -> torch.dtype:
    import torch

    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    chosen, reason = choose_dtype(device)
    _log.info("dtype %s because %s", str(chosen).removeprefix("torch."), reason)
    return chosen


def _read_weights(artifact: Artifact, dtype: torch.dtype | None, device: str = "cpu") -> PreTrainedModel:
    """`dtype` None keeps what the files hold."""
    from transformers import AutoModelForCausalLM

    if artifact.manifest.kind == "reward":
        raise UnsupportedModel(f"{artifact.ref} is a reward model: it scores answers and writes none. Score with model.reward.")
    if artifact.manifest.kind not in {"full", "pruned"}:
        raise UnsupportedModel(f"{artifact.ref} is of kind {artifact.manifest.kind}, which torch cannot load. Use full weights.")
    if fp8_of(read_json(artifact.path / "config.json"), artifact.path) is not None:
        raise UnsupportedModel(
            f"{artifact.ref} is stored in FP8, which the engine reads for serving and nothing else does. Make bfloat16 of it once: "
            f"r1ray dequantise {artifact.ref}."
        )
    place = None if device == "cpu" else {"": device}  # not said of the CPU: ZeRO-3 places weights itself
    model, report = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=dtype or "auto", device_map=place, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ArtifactInvalid(f"{artifact.path} lacks {len(missing)} tensors, first {missing[0]}. Import the complete model again.")
    return model


def _with_adapter(model: PreTrainedModel, artifact: Artifact) -> PeftModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, artifact.path, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        raise AdapterMismatch(f"{artifact.ref} does not fit {artifact.manifest.base}: {error}. Train it again on that base.") from error


def _merged(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Each adapted layer: to float32, update added, to `dtype`; then the other weights."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.peft_config["default"].peft_type
        raise UnsupportedModel(f"A {kind} adapter is no change of weights and cannot be merged. Load it with merge=False.")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.to(torch.float32)
            layer.merge(safe_merge=True)
            layer.get_base_layer().to(dtype)
    plain = model.base_model.unload()
    _cast(plain, dtype)
    return plain


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As loading in `dtype` would: `model.to(dtype)` would also round the rotary frequencies and the router's bias."""
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _probe(artifact: Artifact) -> torch.Tensor:
    """Token ids [1, n] to compare two models on."""
    import torch

    ids = load_tokenizer(artifact)("The quick brown fox says 你好: 1 + 1 = 2.", add_special_tokens=True)["input_ids"]
    return torch.tensor([ids[:32]])


def _copy_companions(artifact: Artifact, out_dir: Path) -> None:
    """What belongs to the model and not to the adapter: tokenizer, templates, terms."""
    for file in artifact.path.iterdir():
        if file.is_file() and not file.name.startswith("adapter_") and file.name not in {MANIFEST, POLICY}:
            shutil.copyfile(file, out_dir / file.name)


def _verify(out_dir: Path, base: Artifact, probe: torch.Tensor, expected: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    before, after = tensor_shapes(weight_files(base.path)), tensor_shapes(weight_files(out_dir))
    if _count(before) != _count(after):
        raise AdapterMismatch(f"The merged model has {len(after)} tensors of other sizes than its base's {len(before)}. This is a defect.")
    model = AutoModelForCausalLM.from_pretrained(out_dir, dtype="auto").eval()
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise AdapterMismatch(
            f"Merging made {len(broken)} tensors infinite, first {broken[0]}. The adapter diverged in training: use an older one."
        )
    found = model(probe).logits.detach().float()
    error = float((found - expected).norm() / expected.norm())
    allowed = _TOLERANCE[str(model.dtype).removeprefix("torch.")]
    if not error <= allowed:
        raise AdapterMismatch(f"The merged model's logits differ from the adapter's by {error:.3f} (limit {allowed}). Serve it unmerged.")
    _log.info("merged into %s: relative error of the logits %.2g", out_dir, error)


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    import math

    return sum(math.prod(shape) for shape in shapes.values())
