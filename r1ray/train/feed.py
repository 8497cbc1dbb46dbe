"""Token rows -> the tensors of this rank's forward passes, in the plan's order; padded, or packed end to end, to a multiple of eight.

The rows may lie in mapped files: each is asked for once per pass, and none is kept.
Right padding needs no attention mask: with causal attention no real position looks to its right, and padding carries no loss.
Packed dialogues restart their position ids, from which transformers builds an attention mask that keeps them apart; attention that computes
row by row is told their lengths in its place.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from r1ray.train.attention import BLOCKWISE, row_lengths
from r1ray.train.batches import BatchPlan, even_length

__all__ = ["Feed"]

Rows = Sequence[Sequence[int]]


@dataclass(slots=True)
class Feed(Dataset[dict[str, torch.Tensor]]):
    """Item `i` is forward pass `i % accumulation` of optimizer step `i // accumulation`."""

    input_ids: Rows
    masks: Rows
    plan: BatchPlan
    num_steps: int
    rank: int
    num_workers: int
    accumulation: int
    pad_id: int
    packing: bool = False
    attention: str = "eager"

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, number = divmod(index, self.accumulation)
        shared = self.plan.micro_batches(step, rank=self.rank, num_workers=self.num_workers, accumulation=self.accumulation)
        rows = shared[number]
        if not rows:  # every rank must take equally many passes: this one computes a row that carries no loss
            item = self._padded([self.plan.batch(step)[0]])
            return {**item, "labels": torch.full_like(item["labels"], -100)}
        return self._packed(rows) if self.packing else self._padded(rows)

    def loader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """One item at a time, in order, in this process; accelerate can skip what a resumed run has done."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def num_trained(self, step: int) -> int:
        """Tokens that carry loss in the whole batch of a step, over all workers: what the loss is divided by."""
        return sum(sum(self.masks[row][1:]) for row in self.plan.batch(step))

    def num_tokens(self, step: int) -> int:
        return sum(self.plan.lengths[row] for row in self.plan.batch(step))

    def _padded(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        length = even_length(max(self.plan.lengths[row] for row in rows), len(rows))
        ids_BT = torch.full((len(rows), length), self.pad_id)
        labels_BT = torch.full((len(rows), length), -100)
        for place, row in enumerate(rows):
            ids, labels = self._row(row)
            ids_BT[place, : len(ids)] = ids
            labels_BT[place, : len(ids)] = labels
        return {"input_ids": ids_BT, "labels": labels_BT}

    def _packed(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        pairs = [self._row(row) for row in rows]
        length = sum(len(ids) for ids, _ in pairs)
        ids, labels = pairs[-1]
        missing = even_length(length, 1) - length  # to the last row's right, which nothing of it sees
        pairs[-1] = functional.pad(ids, (0, missing), value=self.pad_id), functional.pad(labels, (0, missing), value=-100)
        positions = [torch.arange(len(ids)) for ids, _ in pairs]
        ids_1T, labels_1T = (torch.cat(parts)[None] for parts in zip(*pairs, strict=True))
        packed = {"input_ids": ids_1T, "labels": labels_1T, "position_ids": torch.cat(positions)[None]}
        if self.attention == BLOCKWISE:
            packed["attention_mask"] = row_lengths([len(ids) for ids, _ in pairs])
        return packed

    def _row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, labels); a dialogue's first token has nothing that predicts it, least of all its neighbour's last."""
        ids = torch.tensor(self.input_ids[row])
        labels = torch.where(torch.tensor(self.masks[row], dtype=torch.bool), ids, -100)
        labels[0] = -100
        return ids, labels


def _only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    (item,) = items
    return item
