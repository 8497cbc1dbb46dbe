"""TRL's GRPOTrainer with our prompts, our engine's answers, rewards kept apart and our schedule.

Of TRL: the loss, the advantages, log-probabilities, the divergence from the base. Ours: who is asked when, who writes, who judges, and
how a step's answers are parted into passes (by length, each cut to its own width).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from r1ray.engine.protocol import Engine
from r1ray.model import template
from r1ray.model.reasoning import OPEN, split
from r1ray.train import heldout
from r1ray.train.logprobs import add_answer_logprobs
from r1ray.train.objective.base import Bench
from r1ray.train.objective.grpo_feed import Asked, PromptFeed
from r1ray.train.prompts import Prompt
from r1ray.train.rewards.base import Answer, Scale, judged
from r1ray.train.rollouts import EngineRollouts, seed_of
from r1ray.train.trainer import PacedTrainer

__all__ = ["GroupTrainer", "grpo_arguments", "passes_of"]

_SHARED = ("num_items_in_batch",)  # of TRL's batch: not one entry per answer
_log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


class GroupTrainer(PacedTrainer, GRPOTrainer):
    """One optimizer step per batch of answers, so no answer is older than the weights that it changes."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: GRPOConfig,
        *,
        bench: Bench,
        feed: PromptFeed,
        scales: Sequence[Scale],
    ) -> None:
        self.scales, self.thinks = list(scales), template.read(bench.order.base).thinks
        self._held_out = _HeldOut(self)
        super().__init__(
            model=model,
            args=arguments,
            reward_funcs=[_named(scale.name) for scale in scales],
            train_dataset=Dataset.from_dict({"prompt": ["shown"]}),  # TRL looks at it; the feed gives the prompts
            processing_class=bench.tokenizer(),
            callbacks=[self._held_out, *bench.callbacks],  # before the clock begins
        )
        self.pace_by(feed, bench.schedule)
        self._knows_entropy = self.temperature != 1.0 or not arguments.use_cpu
        if not self._knows_entropy:
            plain = self.accelerator.unwrap_model(self.model)
            add_answer_logprobs(plain.get_base_model() if hasattr(plain, "get_base_model") else plain)
        self.rollouts: EngineRollouts | None = None
        self._rows: list[dict[str, Any]] = []
        self._passes: list[Batch] = []
        self._marks: dict[str, float] = {}
        self._num_undecided = 0
        self._logps = torch.empty(0)

    # --- set after making

    def answer_by(self, engine: Engine) -> None:
        """Let the engine write the answers instead of the trained model itself."""
        directory = Path(self.args.output_dir) / "policy"
        self.rollouts = EngineRollouts(engine, directory, tuple(self.eos_token_ids), self.max_completion_length)

    def judge_on(self, prompts: Sequence[Prompt], run_directory: Path) -> None:
        """Answer `prompts` greedily before and after, and note the mean rewards in the run's directory."""
        self._held_out.prompts, self._held_out.run_directory = prompts, run_directory

    # --- answers

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        seen = self.state.num_input_tokens_seen
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert isinstance(self.feed, PromptFeed)
        self.feed.count(self.state.global_step, int(self.state.num_input_tokens_seen - seen))
        drawn = batch.pop("sampling_per_token_logps", None)
        if drawn is not None and self.temperature == 1.0:  # the engine's log-probabilities are those before a temperature
            batch["old_per_token_logps"] = drawn
        return batch

    def _tokenize_prompts(self, _: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(row["asked"].prompt.ids) for row in self._rows], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **_: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.rollouts is None:
            written: tuple[list[list[int]], None] = super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations)
            return written
        self.rollouts.load(self.accelerator.unwrap_model(self.model))
        step, seed = self.state.global_step, self.args.seed
        seeds = [seed_of(seed, step, row["asked"].place, row["asked"].generation) for row in self._rows]
        drawn = self.rollouts.draw(prompt_ids, seeds, temperature=self.temperature, top_p=self.top_p)
        return [one.token_ids for one in drawn], [one.logprobs for one in drawn]

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], _prompts: Any, _completions: Any, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        asked: list[Asked] = [row["asked"] for row in inputs]
        answers = self._answers([one.prompt for one in asked], [one.place for one in asked], completion_ids_list)
        return gather(torch.tensor(judged(self.scales, answers), device=self.accelerator.device))

    def _answers(self, prompts: Sequence[Prompt], groups: Sequence[int], ids: Sequence[Sequence[int]]) -> list[Answer]:
        said = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts = [split(text, self.thinks) for text in said]
        return [
            Answer(
                prompt=prompt.messages,
                reference=prompt.reference,
                text=f"{OPEN}\n{text}" if self.thinks and not text.lstrip().startswith(OPEN) else text,
                content=content,
                reasoning=reasoning,
                num_tokens=len(tokens),
                is_finished=tokens[-1] in self.eos_token_ids,
                group=group,
            )
            for prompt, group, tokens, text, (reasoning, content) in zip(prompts, groups, ids, said, parts, strict=True)
        ]

    # --- passes and their loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        if not self._passes:
            self._passes = passes_of(self._generate_and_score_completions(inputs), self.args.gradient_accumulation_steps)
        return self._passes.pop(0)

    def compute_loss(self, model: Any, inputs: Batch, *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        """TRL's loss, each pass counted by its share of the rank's answers; DeepSpeed adds up passes and averages ranks."""
        loss: torch.Tensor = super().compute_loss(model, inputs)
        if self.loss_type != "dapo":  # dapo divides by all tokens of the step, the others by this pass' answers
            loss = loss * len(inputs["advantages"]) * self.args.gradient_accumulation_steps * self._world / num_items_in_batch
        self.tally.add(loss * num_items_in_batch / self._world)
        self._mark(inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        computed = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = computed[0].detach()
        return computed

    @property
    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    # --- what is told

    def marks(self) -> dict[str, float]:
        """Mean reward per axis first; then length, divergence, groups that agree, and how the engine's probabilities differ."""
        return self._marks

    def _mark(self, inputs: Batch) -> None:
        told, mode = self._metrics["train"], {"mean_length": "answer_tokens", "clipped_ratio": "unfinished"}
        if (old := inputs.get("old_per_token_logps")) is not None:
            mask = inputs["completion_mask"].bool()
            told["ratio"].append(float((self._logps - old)[mask].abs().mean()))
        if self._passes:
            return
        names = {f"rewards/{scale.name}/mean": f"reward/{scale.name}" for scale in self.scales}
        names |= {f"completions/{key}": name for key, name in mode.items()}
        names |= {"entropy": "entropy"} if self._knows_entropy else {}
        names |= {"kl": "kl", "frac_reward_zero_std": "undecided", "ratio": "rollout_log_ratio"}
        self._marks = {name: sum(told[key]) / len(told[key]) for key, name in names.items() if told.get(key)}
        told.clear()
        if self._marks.get("undecided") == 1.0:
            self._warn()

    def _warn(self) -> None:
        """In the job log, ever more rarely: after 1, 2, 4, 8, ... such steps."""
        self._num_undecided += 1
        if self.accelerator.is_main_process and self._num_undecided.bit_count() == 1:
            _log.warning(
                "step %d taught nothing: the answers of each group got equal rewards (so did those of %d steps in all). Raise "
                "train.grpo.temperature or num_generations, or add a reward of degrees (overlap, length).",
                self.state.global_step + 1,
                self._num_undecided,
            )

    def judge(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Mean reward per axis of one greedy answer to each prompt, shared over the ranks."""
        mine = list(prompts)[self.accelerator.process_index :: self._world]
        asked = mine or list(prompts[:1])  # ZeRO-3 gathers weights while it writes: every rank has to take part
        ids = self._greedy([prompt.ids for prompt in asked])
        answers = self._answers(asked, range(len(asked)), ids)[: len(mine)]
        rows = [[*row, float(answer.num_tokens)] for row, answer in zip(judged(self.scales, answers), answers, strict=True)]
        sums = torch.tensor([[*row, 1.0] for row in rows] or [[0.0] * (len(self.scales) + 2)], dtype=torch.float64).sum(0)
        *totals, count = gather(sums[None].to(self.accelerator.device)).sum(0).tolist()
        return {name: total / count for name, total in zip([*(s.name for s in self.scales), "answer_tokens"], totals, strict=True)}

    def _greedy(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        if self.rollouts is not None:
            self.rollouts.load(self.accelerator.unwrap_model(self.model))
            return [one.token_ids for one in self.rollouts.draw(prompt_ids, [0] * len(prompt_ids), temperature=0.0)]
        sampled: dict[str, Any] = self.generation_kwargs  # type: ignore[has-type]
        usual: GenerationConfig = self.generation_config  # type: ignore[has-type]
        self.generation_kwargs = {key: sampled[key] for key in ("max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id")}
        self.generation_kwargs["do_sample"] = False
        self.generation_config = GenerationConfig(**self.generation_kwargs, disable_compile=True)
        try:
            return super()._generate_single_turn(prompt_ids, None, {}, 1)[0]
        finally:
            self.generation_config, self.generation_kwargs = usual, sampled


class _HeldOut(TrainerCallback):
    """Before the first step and after the last one."""

    def __init__(self, trainer: GroupTrainer) -> None:
        self.trainer = trainer
        self.prompts: Sequence[Prompt] = ()
        self.run_directory = Path()

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self._write("before")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._write("after")
        if self.trainer.rollouts is not None:
            self.trainer.rollouts.close()

    def _write(self, when: str) -> None:
        if not self.prompts:
            return
        means = self.trainer.judge(self.prompts)
        if self.trainer.accelerator.is_main_process:
            heldout.note(self.run_directory, when, means)


def grpo_arguments(bench: Bench) -> GRPOConfig:
    settings = bench.order.config.grpo
    arguments = GRPOConfig(
        **bench.arguments(),
        steps_per_generation=settings.num_generations,  # any multiple passes TRL's check that groups are whole; ours are by the feed
        num_generations=settings.num_generations,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        beta=settings.beta,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss,
        reward_weights=[reward.weight for reward in settings.rewards],
        multi_objective_aggregation="normalize_then_sum",
        num_iterations=1,
    )
    arguments.steps_per_generation = bench.accumulation  # what it is: one batch of answers per optimizer step
    arguments.generation_batch_size = bench.order.config.rows_per_batch
    return arguments


def passes_of(batch: dict[str, Any], num: int) -> list[Batch]:
    """A step's answers as `num` passes of nearly equal size, similar lengths together, each without columns that are all padding."""
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    passes = []
    for rows in torch.argsort(lengths, stable=True).tensor_split(num):
        one = {key: value if key in _SHARED else value[rows] for key, value in batch.items()}
        before, after = int(one["prompt_mask"].sum(1).max()), int(one["completion_mask"].sum(1).max())
        cut = {key: one[key][:, -before:] for key in ("prompt_ids", "prompt_mask")}
        cut |= {key: one[key][:, :after] for key in one if one[key].dim() == 2 and key not in cut}
        passes.append(one | cut)
    return passes


def _named(name: str) -> Any:
    """TRL names its metrics after functions; these are never called, since all judges are asked at once."""

    def reward(**_: Any) -> list[float]:
        raise NotImplementedError

    reward.__name__ = name
    return reward
