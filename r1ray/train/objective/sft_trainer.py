"""TRL's SFTTrainer with our batches, our loss and our schedule."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from r1ray.errors import UnsupportedModel
from r1ray.train.feed import Feed
from r1ray.train.loss import add_supervised_loss, has_plain_head
from r1ray.train.objective.base import Bench
from r1ray.train.parallel.sequence import SlicedFeed
from r1ray.train.schedule import Schedule
from r1ray.train.trainer import PacedTrainer

__all__ = ["SupervisedTrainer", "sft_arguments"]

_log = logging.getLogger(__name__)


class SupervisedTrainer(PacedTrainer, SFTTrainer):
    """The loss of a step is the mean over all its supervised tokens, however they are spread over ranks and passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: SFTConfig,
        *,
        feed: Feed | SlicedFeed,
        schedule: Schedule,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        # TRL looks at the first row of a data set; the feed gives the batches
        shown = Dataset.from_dict({"input_ids": [list(feed.input_ids[0])], "labels": [list(feed.input_ids[0])]})
        super().__init__(model=model, args=arguments, train_dataset=shown, processing_class=tokenizer, callbacks=callbacks)
        self.pace_by(feed, schedule)
        plain = self.accelerator.unwrap_model(self.model)
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        self._is_compact = has_plain_head(plain) and not self.aux_loss_enabled
        if self._is_compact:
            add_supervised_loss(plain, arguments.label_smoothing_factor)
        elif arguments.label_smoothing_factor:
            raise UnsupportedModel(f"{type(plain).__name__} scales its logits or balances experts: set train.label_smoothing=0 for it.")
        else:
            _log.info("loss by TRL's fused head, because %s scales its logits or balances experts", type(plain).__name__)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        if self._is_compact:
            nll = model(**inputs, supervised=True)
        else:
            nll = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum()
        return self.counted(nll, num_items_in_batch)


def sft_arguments(bench: Bench) -> SFTConfig:
    config = bench.order.config
    return SFTConfig(
        **bench.arguments(),
        label_smoothing_factor=config.label_smoothing,
        neftune_noise_alpha=config.neftune_alpha,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
