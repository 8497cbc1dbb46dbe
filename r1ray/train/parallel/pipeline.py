"""Pipeline parallelism: DeepSpeed's PipelineModule needs a loop of its own; this one, between the same callbacks as TRL's.

The feed gives the micro-batches, the schedule the learning rate, `Pace` exchanges, records, saves and stops: so progress, checkpoints,
resume and the loss of a step are those of every other training. A checkpoint holds DeepSpeed's files per layer and, as the others do,
weights that transformers reads: each stage writes its own shard, rank 0 the index.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerControl, TrainerState

from r1ray.model.checkpoint import INDEX
from r1ray.train.feed import Feed
from r1ray.train.parallel.stages import build_stages
from r1ray.train.trainer import Batches, Tally
from r1ray.train.zero import deepspeed_config

if TYPE_CHECKING:
    from r1ray.train.objective.base import Bench
    from r1ray.train.parallel.layout import Layout
    from r1ray.train.parallel.sequence import SlicedFeed

__all__ = ["PipelineTrainer"]

_RANDOM = "rng_state_{rank}.pth"


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What callbacks ask of transformers' TrainingArguments."""

    device: torch.device
    output_dir: str


class PipelineTrainer:
    """Supervised fine-tuning over stages; the loss is the sum over the batch's supervised tokens by their number."""

    def __init__(self, bench: Bench, feed: Feed) -> None:
        import deepspeed

        order, config = bench.order, bench.order.config
        self.layout: Layout | None = bench.layout
        self.feed: Batches = feed
        self.schedule, self.tally = bench.schedule, Tally()
        self.state, self.learning_rate = TrainerState(), 0.0
        self.held_out: Feed | SlicedFeed | None = None
        self.num_held_out = 0
        self.num_trained_tensors = 0
        """In what this rank saved last."""
        self._held: dict[str, float] = {}
        self._bench, self._rows, self._num_trained = bench, feed, 1
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        model = bench.model()
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its layers
            self._stages = build_stages(
                model,
                num_stages=bench.layout.pipeline,
                stage=bench.layout.place(bench.global_rank).stage,
                checkpointing=config.gradient_checkpointing,
                loss_fn=self._loss,
            )
        optimizer = torch.optim.AdamW(self._groups(decayed), lr=config.learning_rate, fused=True)
        settings = deepspeed_config(config, accumulation=bench.accumulation, bf16=order.dtype == "bfloat16")
        self.model_wrapped: Any = deepspeed.initialize(model=self._stages.module, optimizer=optimizer, config=settings)[0]
        self.args: Any = _Arguments(self.model_wrapped.device, str(bench.staging))

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Until the callbacks say stop, which they do at the last step at the latest."""
        control = TrainerControl()
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint))
        self.state.max_steps = self._bench.order.num_steps  # says, as in transformers' trainer, that training has begun
        self._tell("on_train_begin", control)
        while not control.should_training_stop and self.state.global_step < self._bench.order.num_steps:
            self._step()
            self._tell("on_pre_optimizer_step", control)  # the step is made, but nothing of it is kept when this raises
            self.state.global_step += 1
            self._tell("on_step_end", control)
            if control.should_save:
                control.should_save = False
                self._save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
                self._tell("on_save", control)
        self._tell("on_train_end", control)

    def marks(self) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}

    def held_norms(self) -> dict[str, float]:
        """Of the adapter as the stages held it."""
        return self._held

    def held_out_loss(self) -> tuple[float, int]:
        """The last stage has the labels and so the loss."""
        assert self.held_out is not None, "nothing was held out"
        passes = _pairs(self.held_out, range(self.num_held_out))
        self.model_wrapped.eval_batch(passes, reduce_output=None, bcast_loss=False, num_micro_batches=self.num_held_out)
        return self.tally.take(), sum(self.held_out.num_trained(step) for step in range(self.num_held_out))

    def _tell(self, event: str, control: TrainerControl) -> None:
        for callback in self._bench.callbacks:
            getattr(callback, event)(self.args, self.state, control)

    def _step(self) -> None:
        step = self.state.global_step
        self.learning_rate = self._bench.order.config.learning_rate * self.schedule.factor(step)
        for group in self.model_wrapped.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._num_trained = self.feed.num_trained(step)
        accumulation = self._bench.accumulation
        self.model_wrapped.train_batch(_pairs(self._rows, range(step * accumulation, (step + 1) * accumulation)))

    def _loss(self, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """DeepSpeed averages over passes and over the workers that compute different rows."""
        summed = self._stages.loss(hidden_BTD, labels_BT)
        self.tally.add(summed)
        return summed * self._bench.accumulation * self._bench.layout.data / self._num_trained

    def _groups(self, decayed: set[str]) -> list[dict[str, Any]]:
        """As transformers groups them: no weight decay for norms and biases."""
        mine = {id(parameter) for parameter in self._stages.module.parameters() if parameter.requires_grad}
        named = [(name, parameter) for name, parameter in self._stages.model.named_parameters() if id(parameter) in mine]
        with_decay = [parameter for name, parameter in named if name in decayed]
        without = [parameter for name, parameter in named if name not in decayed]
        groups = [(with_decay, self._bench.order.config.weight_decay), (without, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def _save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        engine, step = self.model_wrapped, self.state.global_step
        engine.save_checkpoint(str(directory), tag=f"global_step{step}", client_state={"r1ray_step": step})
        torch.save(_random_state(), directory / _RANDOM.format(rank=self._bench.global_rank))
        place = self._bench.layout.place(self._bench.global_rank)
        mine = self._weights() if place.data == 0 else {}
        if self._bench.order.config.method == "lora":
            self._save_adapter(directory, mine)
        else:
            self._save_shards(directory, mine)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What this stage trains or keeps, by the model's own names; a shared matrix only once."""
        shared = ("lm_head.weight", *(() if self._bench.layout.place(self._bench.global_rank).stage == 0 else ("embed_tokens.weight",)))
        state = self._stages.model.state_dict().items()
        here = {name: tensor for name, tensor in state if tensor.device.type != "meta"}
        if self._stages.is_tied:
            here = {name: tensor for name, tensor in here.items() if not name.endswith(shared)}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in here.items()}

    def _save_adapter(self, directory: Path, mine: dict[str, torch.Tensor]) -> None:
        adapter = {name: tensor for name, tensor in mine.items() if ".lora_" in name}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, adapter)
        if self._bench.global_rank == 0:
            whole = {name: tensor for part in parts for name, tensor in part.items()}
            self.num_trained_tensors = len(whole)
            self._held = {name.replace(".default.", "."): float(tensor.float().norm()) for name, tensor in whole.items()}
            self._stages.model.save_pretrained(directory, state_dict=whole)

    def _save_shards(self, directory: Path, mine: dict[str, torch.Tensor]) -> None:
        """Transformers turns names and fused tensors into those of the files; the shards' numbers are the stages'."""
        from safetensors.torch import save_file
        from transformers.core_model_loading import revert_weight_conversion

        rank, num_stages = self._bench.global_rank, self._bench.layout.pipeline
        shard = f"model-{self._bench.layout.place(rank).stage + 1:05d}-of-{num_stages:05d}.safetensors"
        written: dict[str, str] = {}
        self.num_trained_tensors = len(mine)  # in the file there are more where experts were fused
        if mine:
            stored = revert_weight_conversion(self._stages.model, mine)
            save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / shard, metadata={"format": "pt"})
            written = dict.fromkeys(stored, shard)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (written, sum(tensor.nbytes for tensor in mine.values())))
        if rank == 0:
            places = {name: file for part, _ in parts for name, file in part.items()}
            index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": places}
            (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
            self._stages.model.config.save_pretrained(directory)

    def _resume(self, directory: Path) -> None:
        _, client = self.model_wrapped.load_checkpoint(str(directory))
        self.state.global_step = int(client["r1ray_step"])
        saved = directory / _RANDOM.format(rank=self._bench.global_rank)
        if saved.is_file():
            _set_random_state(torch.load(saved, weights_only=True))


def _pairs(feed: Feed | SlicedFeed, passes: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, labels): the first stage takes the one, the last the other."""
    for number in passes:
        batch = feed[number]
        yield batch["input_ids"], batch["labels"]


def _random_state() -> dict[str, torch.Tensor]:
    """Dropout's; data order and adapters have seeds of their own."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
