"""The seam between how a training runs (workers, checkpoints, schedule, resume) and what it minimises.

An objective reads its rows in the driver, tokenises them once, and builds the trainer on each worker. What it hands over are the nouns
below; it knows no Ray, no checkpoint and no clock.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from r1ray.settings import Settings
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import Layout
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from r1ray.train.config import FinetuneConfig
    from r1ray.train.feed import Feed
    from r1ray.train.parallel.sequence import SlicedFeed
    from r1ray.train.schedule import Schedule
    from r1ray.train.trainer import Paced

__all__ = ["Bench", "Objective", "Rows", "identity"]


class Rows(Protocol):
    """What was read, before any tokenizer: its hash names the run."""

    @property
    def data_hash(self) -> str: ...


def identity(data_hash: str, *parts: str | None) -> str:
    """The hash that names a run: of the rows' text, and of whatever else decides what is learned from them (None: nothing)."""
    for part in parts:
        if part is not None:
            data_hash = hashlib.sha256(f"{data_hash} {part}".encode()).hexdigest()
    return data_hash


@dataclass(slots=True, kw_only=True)
class Bench:
    """What a worker lays ready for its objective.

    Call `arguments` before `model`: building TRL's arguments is what tells transformers about ZeRO-3.
    `rank` and `num_workers` count workers that compute different rows.
    """

    order: WorkOrder
    rank: int
    num_workers: int
    accumulation: int
    staging: Path
    schedule: Schedule
    callbacks: list[TrainerCallback]
    layout: Layout
    global_rank: int
    """Among all workers, also those that share rows."""
    universal: bool = False
    """Whether what is resumed was converted from another number of workers."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every TRL config takes: ours for steps, DeepSpeed, optimizer; saving and logging left to the callbacks."""
        from r1ray.train.trainer import common_arguments

        order = self.order
        bf16 = order.dtype == "bfloat16"
        return common_arguments(
            order.config,
            output=self.staging,
            num_steps=order.num_steps,
            accumulation=self.accumulation,
            bf16=bf16,
            universal=self.universal,
        )

    def model(self) -> PreTrainedModel:
        """The base with what is trained on it, every weight or an adapter that all ranks initialise alike."""
        from r1ray.train.build import trained_model

        self._share()
        model = trained_model(self.order)
        if self.layout.tensor > 1:
            from r1ray.train.parallel.tensor import share_tensors

            share_tensors(model, self.layout)
        if self.order.config.method == "lora" and self.order.config.zero_stage < 3:
            from r1ray.train.fused import fuse_adapters

            fuse_adapters(model)
        return model

    def sliced(self, feed: Feed) -> Feed | SlicedFeed:
        """The feed, or this worker's part of its rows where workers share them."""
        from r1ray.train.parallel.sequence import SlicedFeed

        degree = self.layout.sequence
        return SlicedFeed(feed, self.layout.place(self.global_rank).sequence, degree) if degree > 1 else feed

    def _share(self) -> None:
        """Before the model is loaded."""
        if self.layout.sequence > 1:
            from r1ray.train.parallel.sequence import share_sequences

            share_sequences(self.layout.sequence)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from r1ray.model.load import load_tokenizer

        return load_tokenizer(self.order.base)


class Objective(ABC):
    """One way of learning."""

    @abstractmethod
    def read(self, config: FinetuneConfig) -> Rows:
        """The rows of `config.data`, in the driver.

        Raises:
            NothingToTrain, TooManyBadRows: the data cannot be learned from.
        """

    @abstractmethod
    def prepare(self, rows: Any, base: Artifact, config: FinetuneConfig, settings: Settings) -> Any:
        """The rows as tokens, cached on disk, in the driver: what `WorkOrder.material` carries."""

    @abstractmethod
    def trainer(self, bench: Bench) -> Paced:
        """The trainer of this rank, on the worker."""

    def closing(self, _directory: Path, _say: Callable[[str], object]) -> dict[str, float]:
        """What the finished run, in its directory, is measured by beside its loss: said in the driver and kept with the version."""
        return {}
