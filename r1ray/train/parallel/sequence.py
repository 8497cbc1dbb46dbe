"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): each worker has a part of every row, and in attention a part of the heads.

The workers of a group compute the same rows. The feed gives each its slice; an all-to-all before attention exchanges positions for
heads, one after it exchanges them back. ZeRO splits its states over all workers and sums their gradients.
DeepSpeed has the attention; it wants one batch size and one head width, and so that is mended here.

Shapes: B rows, H heads, T positions, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from r1ray.train.feed import Feed

__all__ = ["SlicedFeed", "share_sequences"]

CORE = "sdpa"  # needs no mask of T x T, which no worker has


@dataclass(slots=True)
class SlicedFeed(Dataset[dict[str, torch.Tensor]]):
    """A feed of which this worker sees slice `part` of `num_parts` of every row."""

    whole: Feed
    part: int
    num_parts: int

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return sliced(self.whole[index], self.part, self.num_parts, self.whole.pad_id)

    def loader(self) -> DataLoader[dict[str, torch.Tensor]]:
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def num_trained(self, step: int) -> int:
        return self.whole.num_trained(step)

    def num_tokens(self, step: int) -> int:
        return self.whole.num_tokens(step)

    @property
    def input_ids(self) -> Any:
        return self.whole.input_ids


def sliced(batch: dict[str, torch.Tensor], part: int, num_parts: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Labels are shifted before the cut, so that the last position of a slice still knows its next token."""
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    missing = -ids_BT.shape[1] % num_parts
    ids_BT = functional.pad(ids_BT, (0, missing), value=pad_id)
    next_BT = functional.pad(labels_BT[:, 1:], (0, missing + 1), value=-100)
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    width = ids_BT.shape[1] // num_parts
    mine = slice(part * width, (part + 1) * width)
    return {
        "input_ids": ids_BT[:, mine].contiguous(),
        "position_ids": positions_BT[:, mine].contiguous(),
        "shift_labels": next_BT[:, mine].contiguous(),
    }


def share_sequences(degree: int) -> None:
    """Put Ulysses in the place of transformers' sdpa, and tell ZeRO of the groups; in every worker, before the model is loaded."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes torch's process group over
    parallel_state_sp.initialize_sequence_parallel(degree)
    groups.mpu = parallel_state_sp
    ulysses = _ulysses(ALL_ATTENTION_FUNCTIONS[CORE], parallel_state_sp.get_sequence_parallel_group(), degree)

    def attention(module: Any, query: Any, key: Any, value: Any, _mask: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        width, value_width = query.shape[-1], value.shape[-1]
        heads_BTD, weights = ulysses(module, query, key, functional.pad(value, (0, width - value_width)), None, *args, **kwargs)
        if value_width == width:
            return heads_BTD, weights
        num_rows, num_positions, _ = heads_BTD.shape
        parts = heads_BTD.view(num_rows, num_positions, -1, width)[..., :value_width]
        return parts.reshape(num_rows, num_positions, -1), weights

    ALL_ATTENTION_FUNCTIONS[CORE] = attention


def _ulysses(core: Any, group: Any, degree: int) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    class Ulysses(UlyssesSPAttentionHF):
        """DeepSpeed's, of which each call has its own number of rows: the last batch of an epoch is smaller."""

        def forward(self, module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            num_rows, num_heads, _, width = query.shape
            self.batch_size, self.attn_head_count, self.attn_head_size = num_rows, num_heads, width
            self.local_q_head_count = num_heads // degree
            self.kv_replication_factor = degree // key.shape[1]
            self.local_kv_head_count = max(1, key.shape[1] // degree)
            self.required_query_shape = torch.Size([1, num_rows, num_heads, width])
            self.required_key_value_shape = torch.Size([1, num_rows, key.shape[1], width])
            self.required_context_shape = torch.Size([1, num_rows, width * num_heads // degree])
            return super().forward(module, query, key, *args, **kwargs)

    shape = {"batch_size": 1, "attn_head_count": degree, "attn_head_size": 1, "kv_head_count": degree, "num_hidden_layers": 1}
    return Ulysses(core, **shape, process_group=group, seq_length_is_variable=True)


def _only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    (item,) = items
    return item
