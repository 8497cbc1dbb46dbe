"""Out of memory: the same training with half the dialogues per forward pass, and twice the passes, so that the batch stays.

The loss does not depend on how a batch is cut into passes, so the run goes on from its last checkpoint as if nothing had happened.
Knows no Ray and starts nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

from r1ray.errors import OutOfMemory
from r1ray.train import runs
from r1ray.train.batches import accumulation_steps
from r1ray.train.config import TrainConfig
from r1ray.train.order import WorkOrder

__all__ = ["halved", "rows_per_pass"]


def rows_per_pass(config: TrainConfig) -> int:
    """The most rows that one forward pass of a worker holds, with the fewest workers."""
    rows = math.ceil(config.rows_per_batch / (config.min_workers // config.parallelism.split))
    return math.ceil(rows / accumulation_steps(rows, 1, config.micro_batch_size))


def halved(order: WorkOrder, error: OutOfMemory) -> WorkOrder:
    """The order to try next; remembered, so that the job submitted again begins with it.

    Raises:
        OutOfMemory: one row per pass is already too many, or it was not the rows that took the memory.
    """
    rows = rows_per_pass(order.config)
    if not getattr(error, "in_step", False) or rows == 1:
        least = "That is the least there is. " if rows == 1 else ""
        raise OutOfMemory(f"{error} {least}{_remedies(order.config)}") from error
    smaller = rows // 2
    known = runs.load(order.run_directory)
    if known is not None:
        runs.store(order.run_directory, replace(known, micro_batch_size=smaller))
    return replace(order, config=order.config.model_copy(update={"micro_batch_size": smaller}))


def _remedies(config: TrainConfig) -> str:
    """A prefix can be neither computed twice nor split."""
    if config.method == "prefix":
        return "Set a lower train.max_length or train.prompt.num_virtual_tokens, train.offload, or train.method=prompt."
    return (
        "Set train.gradient_checkpointing=true, a lower train.max_length, train.offload, or more train.num_workers with train.zero_stage=3."
    )
