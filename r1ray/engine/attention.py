"""Attention of the general backend: transformers' attention signature over the paged cache, registered as "r1ray_paged".

Decoding rows are gathered in slices, prompts' pieces one by one, so that what a pass takes besides the cache stays bounded. Latent
attention (DeepSeek's MLA) decodes on the latents: its up-projection is put into query and result (DeepSeek-V2, arXiv 2405.04434), so no
key and no value of a head is ever made; pieces of prompts expand them for some heads at a time. Knows no model and no requests.

Shapes: N packed tokens, R decoding rows, L longest of them, H query heads, K key heads, D head size, C numbers of a latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from r1ray.engine.pages import PagedCache, Rows
from r1ray.errors import UnsupportedModel

__all__ = ["ATTENTION", "leave_latents"]

ATTENTION = "r1ray_paged"


def attend(
    module: torch.nn.Module, query: Tensor, _key: Tensor, _value: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (1, H, N, D) in, (1, N, H, D) out. Keys and values are the cache's."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UnsupportedModel(f"{type(module).__name__} uses soft-capped or sink attention, which the torch engine does not compute.")
    cache: PagedCache = options["pages"]
    heads = _Latent(module, cache) if cache.latent else _Plain(module, cache)
    scale, window = options.get("scaling"), options.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    layout = cache.layout
    outputs = [heads.rows(query[:, :, rows.first : rows.last], rows, rows.mask(window), scale) for rows in layout.rows]
    first = layout.num_rows
    for index, piece in enumerate(layout.prompts):
        last = first + len(piece.ids)
        outputs.append(heads.prompt(query[:, :, first:last], index, layout.prompt_mask(index, window), scale))
        first = last
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


class _Plain:
    """Keys and values of each key head are in the cache."""

    def __init__(self, module: Any, cache: PagedCache) -> None:
        self._layer = module.layer_idx
        self._cache = cache

    def rows(self, query: Tensor, rows: Rows, mask: Tensor | None, scale: float) -> Tensor:
        """(1, H, R, D) -> (R, H, D): one query per row, its heads grouped under their key head, so that no key is repeated."""
        keys, values = self._cache.of_rows(self._layer, rows)
        grouped = torch.unflatten(query[0].transpose(0, 1), 1, (keys.shape[1], -1))
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)

    def prompt(self, query: Tensor, index: int, mask: Tensor | None, scale: float) -> Tensor:
        """(1, H, n, D) -> (n, H, D)."""
        keys, values = self._cache.of_prompt(self._layer, index)
        return _causal(query, keys, values, mask, scale)


class _Latent:
    """Latents are in the cache, and the module's `kv_b_proj` makes keys and values of them."""

    def __init__(self, module: Any, cache: PagedCache) -> None:
        self._layer = module.layer_idx
        self._cache = cache
        self._rank, self._nope = module.kv_lora_rank, module.qk_nope_head_dim
        self._up_HDC = torch.unflatten(_matrix(module.kv_b_proj), 0, (-1, module.qk_nope_head_dim + module.v_head_dim))

    def rows(self, query: Tensor, rows: Rows, mask: Tensor | None, scale: float) -> Tensor:
        """All heads look at one key, the latent and its rotary part: (q W_k) c for q (W_k c), and W_v (p c) for p (W_v c)."""
        (latents,) = self._cache.of_rows(self._layer, rows)
        nope, rotary = torch.split(query[0], [self._nope, query.shape[-1] - self._nope], dim=-1)
        absorbed = torch.cat((torch.matmul(nope, self._up_HDC[:, : self._nope]), rotary), dim=-1)
        seen = scaled_dot_product_attention(
            absorbed.transpose(0, 1)[:, None], latents, latents[..., : self._rank], attn_mask=mask, scale=scale
        )
        return torch.matmul(seen[:, 0].transpose(0, 1), self._up_HDC[:, self._nope :].transpose(1, 2)).transpose(0, 1)

    def prompt(self, query: Tensor, index: int, mask: Tensor | None, scale: float) -> Tensor:
        (latents,) = self._cache.of_prompt(self._layer, index)
        latent_LC, rotary = latents[0, 0, :, : self._rank], latents[..., self._rank :]
        per_head = 2 * latents.itemsize * latents.shape[2] * (self._up_HDC.shape[1] + rotary.shape[-1])  # expanded, and in one key
        num = max(1, self._cache.gather_bytes // per_head)
        parts = []
        for first in range(0, query.shape[1], num):
            up_HDC = self._up_HDC[first : first + num]
            both = torch.unflatten(latent_LC @ up_HDC.flatten(0, 1).T, 1, (-1, up_HDC.shape[1])).transpose(0, 1)[None]
            keys = torch.cat((both[..., : self._nope], rotary.expand(-1, both.shape[1], -1, -1)), dim=-1)
            parts.append(_causal(query[:, first : first + num], keys, both[..., self._nope :], mask, scale))
        return torch.cat(parts, dim=1)


def _causal(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(1, H, n, D) over (1, K, L, D) -> (n, H, D)."""
    has_groups = query.shape[1] > keys.shape[1]
    if mask is not None and has_groups and query.device.type != "cpu":
        return _by_group(query, keys, values, mask, scale)
    attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=has_groups)
    return attended[0].transpose(0, 1)


def _by_group(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As `_causal`: the first query of each key head, then the second. CUDA's kernels that do not write the scores down take a mask or
    grouped heads, not both; the CPU's takes both, and faster.
    """
    grouped = torch.unflatten(query, 1, (keys.shape[1], -1))
    parts = [scaled_dot_product_attention(group, keys, values, attn_mask=mask, scale=scale) for group in grouped.unbind(2)]
    return torch.stack(parts, dim=2)[0].flatten(0, 1).transpose(0, 1)


def _matrix(projection: Any) -> Tensor:
    """What a linear layer multiplies with, the active adapter's update included."""
    if type(projection) is torch.nn.Linear:
        return projection.weight
    weight = projection.weight
    matrix: Tensor = projection(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T
    return matrix


def leave_latents(model: torch.nn.Module) -> None:
    """Have the attention layers hand latents on as they are, instead of expanding them before `attend` sees them.

    Raises:
        UnsupportedModel: a layer with latents expands them in another way than DeepSeek's.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "kv_b_proj"):
            continue
        if not hasattr(module, "expand_kv") or getattr(module.kv_b_proj, "bias", None) is not None:
            raise UnsupportedModel(f"{name} of {type(model).__name__} is no latent attention as DeepSeek's. Use another engine.")
        module.expand_kv = _as_they_are


def _as_they_are(latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    return latents, rotary


AttentionInterface.register(ATTENTION, attend)
