"""The seam between how a training runs (workers, checkpoints, schedule, resume) and what it minimises.

An objective reads its rows in the driver, tokenises them once, and builds the trainer on each worker. What it hands over are the nouns
below; it knows no Ray, no checkpoint and no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from r1ray.settings import Settings
from r1ray.train.order import WorkOrder
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from r1ray.train.config import FinetuneConfig
    from r1ray.train.schedule import Schedule
    from r1ray.train.trainer import PacedTrainer

__all__ = ["Bench", "Objective", "Rows"]


class Rows(Protocol):
    """What was read, before any tokenizer: its hash names the run."""

    @property
    def data_hash(self) -> str: ...


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

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every TRL config takes: ours for steps, DeepSpeed, optimizer; saving and logging left to the callbacks."""
        from r1ray.train.trainer import common_arguments

        order = self.order
        bf16 = order.dtype == "bfloat16"
        return common_arguments(order.config, output=self.staging, num_steps=order.num_steps, accumulation=self.accumulation, bf16=bf16)

    def model(self) -> PreTrainedModel:
        """The base with what is trained on it, every weight or an adapter that all ranks initialise alike."""
        from r1ray.train.build import trained_model

        return trained_model(self.order)

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
    def trainer(self, bench: Bench) -> PacedTrainer:
        """The trainer of this rank, on the worker."""
