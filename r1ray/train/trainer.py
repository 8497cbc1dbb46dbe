"""What all our trainers share, put before a trainer of TRL: where batches come from, how a loss is summed, how the learning rate moves.

All else is TRL's, transformers' and DeepSpeed's: the loop, gradient accumulation, ZeRO, PEFT, state of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerState

from r1ray.train.config import TrainConfig
from r1ray.train.consolidate import take_part, write_weights
from r1ray.train.parallel.layout import Layout
from r1ray.train.schedule import Schedule
from r1ray.train.zero import deepspeed_config

__all__ = ["Batches", "Paced", "PacedTrainer", "Tally", "common_arguments"]


class Batches(Protocol):
    """A rank's forward passes in order, and what a whole batch holds over all ranks."""

    def loader(self) -> Any:
        """A DataLoader of one forward pass per item, in order, `accumulation` of them per optimizer step."""

    def num_trained(self, step: int) -> int:
        """What the summed loss of step `step` (from 0) is divided by: supervised tokens, pairs, ..."""

    def num_tokens(self, step: int) -> int:
        """Tokens without padding, for the speed that is shown."""


class Paced(Protocol):
    """A training loop as the callbacks around its steps see it: TRL's, or a pipeline's own."""

    feed: Batches
    schedule: Schedule
    tally: Tally
    layout: Layout | None
    state: TrainerState
    model_wrapped: Any
    args: Any

    @property
    def learning_rate(self) -> float:
        """Of the step in progress."""

    @property
    def num_trained_tensors(self) -> int:
        """At least as many are in the weights that a rank saves, where it saves any."""

    def held_norms(self) -> dict[str, float]:
        """By its name in what this rank has just saved: at least this norm each tensor of an adapter has there. Empty for other weights."""

    def marks(self) -> dict[str, float]:
        """What a step is told by beside its loss."""

    def held_out_loss(self) -> tuple[float, int]:
        """(this rank's summed loss, items of all ranks) over the held-out rows."""

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """To the end, or to where the callbacks stop it."""


@dataclass(slots=True)
class Tally:
    """Summed loss of this rank's forward passes since it was last taken. Only then is it read from a GPU, so that no pass waits for it."""

    _passes: list[torch.Tensor] = field(default_factory=list)

    def add(self, summed: torch.Tensor) -> None:
        self._passes.append(summed.detach())

    def take(self) -> float:
        taken, self._passes = self._passes, []
        return sum(torch.stack(taken).tolist()) if taken else 0.0


class PacedTrainer(Trainer):
    """Bases of a trainer: `class Ours(PacedTrainer, SFTTrainer)`; its `__init__` ends with `pace_by`.

    `compute_loss` sums over its rows and passes the sum through `counted`: then neither micro-batches nor ranks change the loss.
    """

    loss_is_scaled_for_ga = True
    lr_scheduler: LambdaLR | None
    feed: Batches
    schedule: Schedule
    tally: Tally
    layout: Layout | None = None
    """Set where the model itself is split."""
    held_out: Batches | None = None
    """What `held_out_loss` is measured on, in `num_held_out` batches."""
    num_held_out: int = 0

    def pace_by(self, feed: Batches, schedule: Schedule) -> None:
        """Our batches and our clock in place of the base's."""
        self.feed, self.schedule, self.tally = feed, schedule, Tally()
        self.remove_callback(PrinterCallback)

    @property
    def num_trained_tensors(self) -> int:
        """At least as many are in the weights that a rank saves, where it saves any."""
        return sum(parameter.requires_grad for parameter in self.model.parameters())

    def held_norms(self) -> dict[str, float]:
        """Of this rank's part of each tensor, which is the whole unless ZeRO-3 or a tensor split has others hold the rest."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save or not hasattr(model, "peft_config") or model.active_peft_config.is_prompt_learning:
            return {}
        from peft import get_peft_model_state_dict

        parts = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()))
        return {name: float(getattr(part, "ds_tensor", part).detach().float().norm()) for name, part in parts.items()}

    def marks(self) -> dict[str, float]:
        """What the step is told by beside its loss, equal on all ranks; the first ones also in the job log."""
        return {}

    def held_out_loss(self) -> tuple[float, int]:
        """(this rank's summed loss, items of all ranks) over the held-out rows; between two steps."""
        assert self.held_out is not None, "nothing was held out"
        model = self.model_wrapped
        model.eval()
        with torch.no_grad():
            for inputs in self.held_out.loader():
                self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=1)
        model.train()
        return self.tally.take(), sum(self.held_out.num_trained(step) for step in range(self.num_held_out))

    @property
    def learning_rate(self) -> float:
        """Of the step in progress."""
        assert self.lr_scheduler is not None, "the scheduler comes with training"
        return float(self.lr_scheduler.get_last_lr()[0])

    def counted(self, summed: torch.Tensor, num_items: Any) -> torch.Tensor:
        """A forward pass' summed loss, remembered, as its share of the step's mean over all ranks.

        DeepSpeed averages over the ranks that compute different rows, the loss is a mean over all ranks' items. Ranks that share a
        tensor each have the whole loss.
        """
        layout = self.layout or Layout(world=self.accelerator.num_processes)
        self.tally.add(summed / layout.tensor)
        return summed * layout.data / num_items

    def get_train_dataloader(self) -> Any:
        return self.feed.loader()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], torch.Tensor]:
        samples = [next(epoch_iterator) for _ in range(num_batches)]
        return samples, torch.tensor(self.feed.num_trained(self.state.global_step), device=device)

    def create_scheduler(self, *_: Any, optimizer: Any = None, **__: Any) -> LambdaLR:
        def factor(step: int) -> float:
            return self.schedule.factor(step)

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - the base's
        """Of nobody's interest here; the base's walks through all modules in every pass, 6 ms of a LoRA model of 135M parameters."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """By the rank that writes, from the tensors that it holds: accelerate would first copy the whole model to every rank's memory.

        Where a tensor is split, it is put together when its turn to be written comes, of an adapter at ZeRO-3 before. Of all weights at
        ZeRO-3 the ranks' shards are kept until the end.
        """
        engine = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        is_partitioned = engine is not None and engine.engine.config.get("zero_optimization", {}).get("stage") == 3
        model: Any = self.accelerator.unwrap_model(self.model)
        if output_dir is None:
            return
        if is_partitioned and hasattr(model, "peft_config"):
            self._save_gathered(model, output_dir)
        elif self.layout is not None and self.layout.tensor > 1:
            self._save_parts(output_dir, self.layout)
        elif not self.args.should_save:
            return
        elif is_partitioned:
            _describe(model, output_dir)
        else:
            self._save(output_dir)

    def _save_gathered(self, model: Any, output_dir: str) -> None:
        """By all ranks, of which each has a part of every tensor of the adapter; the base stays in parts."""
        from deepspeed.runtime.zero import GatheredParameters

        trained = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with GatheredParameters([parameter]):
                    if self.args.should_save:
                        trained[name] = parameter.detach().to("cpu", copy=True)
        if trained:
            self._save(output_dir, trained)

    def _save_parts(self, output_dir: str, layout: Layout) -> None:
        """By those workers together that hold one copy of the model; of an adapter only what is its own."""
        from r1ray.train.parallel.tensor import whole_tensors

        if layout.place(self.args.process_index).data > 0:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        tensors = whole_tensors(model, keep=self.args.should_save)
        if hasattr(model, "peft_config"):
            own = {name: tensor.contiguous() for name, tensor in tensors.items() if ".lora_" in name}
            self._save(output_dir, own)
        elif self.args.should_save:
            _write(model, tensors, output_dir)
        else:
            take_part(model, tensors)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What this rank holds, or the adapter that was gathered (`state_dict`)."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save:
            return
        if state_dict is None and output_dir is not None and not hasattr(model, "peft_config"):
            _write(model, model.state_dict(), output_dir)
        elif state_dict is not None and model.active_peft_config.is_prompt_learning:
            (rows,) = state_dict.values()  # PEFT would compute them from what this rank holds
            model.get_prompt_embedding_to_save = lambda _adapter: rows
            super()._save(output_dir, state_dict)
            del model.get_prompt_embedding_to_save
        else:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # without TRL's model card: the manifest says it all


def _write(model: Any, tensors: Mapping[str, Any], output_dir: str) -> None:
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_weights(model, tensors, Path(output_dir))
    _describe(model, output_dir)


def _describe(model: Any, output_dir: str) -> None:
    """The config.json of weights that were written without transformers' save_pretrained."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output_dir)


def common_arguments(
    config: TrainConfig, *, output: Path, num_steps: int, accumulation: int, bf16: bool, universal: bool = False
) -> dict[str, Any]:
    """For any of TRL's config classes. Building one also tells transformers about ZeRO-3, so it must happen before the model is loaded."""
    return {
        "output_dir": str(output),
        "deepspeed": deepspeed_config(config, accumulation=accumulation, bf16=bf16, universal=universal),
        "max_steps": num_steps,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": bf16,
        "fp16": config.dtype == "float16",
        "use_cpu": not config.use_gpu,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "seed": config.seed,
        "data_seed": config.seed,
        # the callbacks decide when to log and to save
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
        "logging_nan_inf_filter": False,  # would read the loss of every pass from the GPU; the exchange between the ranks looks at it
    }
