"""TRL's SFTTrainer with three parts exchanged: where batches come from, how the loss is computed, how the learning rate moves.

All else is TRL's, transformers' and DeepSpeed's: the loop, gradient accumulation, ZeRO, PEFT, state of a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from r1ray.train.config import TrainConfig
from r1ray.train.feed import Feed
from r1ray.train.loss import add_supervised_loss, has_plain_head
from r1ray.train.schedule import Schedule
from r1ray.train.zero import deepspeed_config

__all__ = ["SupervisedTrainer", "Tally", "trainer_arguments"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """Summed loss of this rank's forward passes since it was last taken."""

    nll: float = 0.0

    def take(self) -> float:
        taken, self.nll = self.nll, 0.0
        return taken


class SupervisedTrainer(SFTTrainer):
    """The loss of a step is the mean over all its supervised tokens, however they are spread over ranks and passes."""

    loss_is_scaled_for_ga = True
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: SFTConfig,
        *,
        feed: Feed,
        schedule: Schedule,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        # TRL looks at the first row of a data set; the feed gives the batches
        shown = Dataset.from_dict({"input_ids": [list(feed.input_ids[0])], "labels": [list(feed.input_ids[0])]})
        super().__init__(model=model, args=arguments, train_dataset=shown, processing_class=tokenizer, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.feed, self.schedule, self.tally = feed, schedule, Tally()
        plain = self.accelerator.unwrap_model(self.model)
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        self._is_compact = has_plain_head(plain) and not self.aux_loss_enabled
        if self._is_compact:
            add_supervised_loss(plain)
        else:
            _log.info("loss by TRL's fused head, because %s scales its logits or balances experts", type(plain).__name__)

    @property
    def learning_rate(self) -> float:
        """Of the step in progress."""
        assert self.lr_scheduler is not None, "the scheduler comes with training"
        return float(self.lr_scheduler.get_last_lr()[0])

    def get_train_dataloader(self) -> Any:
        return self.feed.loader()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], torch.Tensor]:
        samples = [next(epoch_iterator) for _ in range(num_batches)]
        return samples, torch.tensor(self.feed.num_trained(self.state.global_step), device=device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        if self._is_compact:
            nll = model(**inputs, supervised=True)
        else:
            nll = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum()
        self.tally.nll += nll.item()
        # DeepSpeed averages over the ranks, the loss is a mean over all ranks' tokens
        return nll * self.accelerator.num_processes / num_items_in_batch

    def create_scheduler(self, *_: Any, optimizer: Any = None, **__: Any) -> LambdaLR:
        def factor(step: int) -> float:
            return self.schedule.factor(step)

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # without TRL's model card: the manifest says it all


def trainer_arguments(config: TrainConfig, *, output: Path, num_steps: int, accumulation: int, bf16: bool) -> SFTConfig:
    """TRL's arguments. Building them also tells transformers about ZeRO-3, so it must happen before the model is loaded."""
    return SFTConfig(
        output_dir=str(output),
        deepspeed=deepspeed_config(config, accumulation=accumulation, bf16=bf16),
        max_steps=num_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=not config.use_gpu,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        seed=config.seed,
        data_seed=config.seed,
        # the callbacks decide when to log and to save
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        average_tokens_across_devices=False,
    )
