"""FP8 checkpoints made of plain ones, for tests: as DeepSeek publishes them, with smaller blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LARGEST = 448.0  # of float8_e4m3fn


def save_as_fp8(directory: Path, out: Path, *, block: tuple[int, int], plain: Path | None = None) -> Path:
    """`out`: the model of `directory` with its projections in float8. `plain`: where to write what that stands for, in bfloat16."""
    tensors = {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    quantised: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj" not in name or tensor.dim() != 2:
            quantised[name] = meant[name] = tensor
            continue
        factors = _largest(tensor.float().abs(), block) / LARGEST
        spread = _spread(factors, block, tensor.shape)
        quantised[name] = (tensor.float() / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        quantised[name + "_scale_inv"] = factors
        meant[name] = (quantised[name].float() * spread).to(torch.bfloat16)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    _write(directory, out, quantised, {"quantization_config": settings})
    if plain is not None:
        _write(directory, plain, meant, {})
    return out


def _largest(tensor: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    down, across = (range(0, size, step) for size, step in zip(tensor.shape, block, strict=True))
    return torch.tensor([[float(tensor[i : i + block[0], j : j + block[1]].max()) for j in across] for i in down])


def _spread(factors: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    return torch.kron(factors, torch.ones(block))[: shape[0], : shape[1]]


def _write(directory: Path, out: Path, tensors: dict[str, torch.Tensor], changes: dict[str, object]) -> None:
    shutil.copytree(directory, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
