"""TRL's DPOTrainer with our batches, our schedule and a reference that is computed once.

The losses are TRL's. What differs: each pair counts alike however passes and ranks are cut, the base's log-probabilities come from
`Reference`, and on CPUs only the answers' positions are multiplied by the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed

from r1ray.evaluate.progress import Progress
from r1ray.train.logprobs import add_answer_logprobs
from r1ray.train.objective.base import Bench
from r1ray.train.objective.pair_trainer import HeldOut, PairTrainer, Scores, ahead
from r1ray.train.pair_feed import PairFeed, Pass
from r1ray.train.reference import Logprobs, Reference
from r1ray.train.schedule import Schedule

__all__ = ["PreferenceTrainer", "dpo_arguments"]


_ROWS_AT_ONCE = 512  # are kept together: what a killed run has computed, the next one need not
_STEPS_AT_ONCE = 8
_STEPS_AHEAD = 2  # the loader has read the beginning of the next one


class PreferenceTrainer(PairTrainer, DPOTrainer):
    """The loss of a step is the mean over all its pairs. Call `judge_on`, then `refer_to`, before training."""

    sft_weight = 0.0
    """Of the better answer's own loss per token."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: DPOConfig,
        *,
        feed: PairFeed,
        schedule: Schedule,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        shown = Dataset.from_dict({"prompt": ["shown"]})  # TRL looks at it; the feed gives the pairs
        super().__init__(
            model=model, args=arguments, train_dataset=shown, processing_class=tokenizer, callbacks=[HeldOut(self), *callbacks]
        )
        self.pace_by(feed, schedule)
        self.precompute_ref_logps = True
        self._reference: dict[int, Logprobs] = {}
        plain: Any = self.model
        if hasattr(plain, "peft_config"):
            if "ref" in plain.peft_config:
                plain.delete_adapter("ref")  # TRL's copy of the adapter as it began, which is the base
            plain = plain.get_base_model()
        add_answer_logprobs(plain)

    def refer_to(self, reference: Reference, *, stepwise: bool = False) -> None:
        """Have the base's log-probabilities of every row that is used: from `reference`, else computed by all ranks and added to it.

        `stepwise` leaves the rows of training to the step that comes to them, for a run of which only the clock knows how many steps it
        has. It needs a base that stays as it is: an adapter's.
        """
        self._cache, self._reference = reference, self._agreed(reference)
        self.feed.reference = self._reference
        num = len(self.feed.rows)
        trained = () if stepwise else sorted(self.feed.rows_used(self.feed.num_steps))
        missing = self._missing([*trained, *range(num, num + len(self.judged_rows))])
        if missing:
            model = prepare_deepspeed(self.model, self.accelerator) if is_deepspeed_zero3_enabled() else self.model  # it gathers the parts
            with self.progress("the base's log-probabilities, pairs", len(missing)) as progress:
                for start in range(0, len(missing), _ROWS_AT_ONCE):
                    self._compute(model, missing[start : start + _ROWS_AT_ONCE], _after(start, progress))
        if stepwise:
            self.add_callback(_Ahead(self))

    def refer_ahead(self, step: int) -> None:
        """Have those of the rows of step `step` and of what is read before it ends; of several more steps where some are missing."""
        if self._missing(self.feed.rows_used(_STEPS_AHEAD, first=step)):
            self._compute(self.model_wrapped, self._missing(self.feed.rows_used(_STEPS_AHEAD + _STEPS_AT_ONCE, first=step)))

    def compute_loss(self, model: Any, inputs: Pass, *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        num_pairs = int(inputs.pop("num_pairs"))
        outputs: list[Any] = []

        def remembered(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        with self.untold():
            loss: torch.Tensor = self._compute_loss(remembered, inputs, return_outputs=False)
        chosen, rejected = _summed(outputs[0], inputs)
        if self.sft_weight:
            answered = inputs["completion_mask"][:, 1:].sum(1).chunk(2)[0]
            loss = loss - self.sft_weight * (chosen / answered).mean()
        if num_pairs:
            self.watch(self.beta * (chosen - rejected - inputs["ref_chosen_logps"] + inputs["ref_rejected_logps"]).detach())
        return self.counted(loss * num_pairs, num_items_in_batch)

    def before(self) -> Mapping[int, Scores]:
        """The reference itself."""
        return {place: self._reference[len(self.feed.rows) + place] for place in range(len(self.judged_rows))}

    def scores(self, model: Any, inputs: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, summed over each answer's tokens."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            return _summed(model(**asked, labels=labels, use_cache=False, fused_lm_head=True), inputs)

    def figures(self, scores: Mapping[int, Scores]) -> dict[str, float]:
        """`accuracy` and `margin` by DPO's implicit reward, level for the base itself; `likelier`: the better answer is per token."""
        policy = torch.tensor([scores[place] for place in sorted(scores)], dtype=torch.float64)
        base = torch.tensor([self._reference[len(self.feed.rows) + place] for place in sorted(scores)], dtype=torch.float64)
        lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in self.judged_rows], dtype=torch.float64)
        moved, mean = policy - base, policy / lengths
        margins = self.beta * (moved[:, 0] - moved[:, 1])
        likelier = ahead(mean[:, 0] - mean[:, 1])
        return {"accuracy": float(ahead(margins).mean()), "margin": float(margins.mean()), "likelier": float(likelier.mean())}

    def _missing(self, rows: Iterable[int]) -> list[int]:
        return sorted(row for row in rows if row not in self._reference)

    def _compute(self, model: Any, missing: Sequence[int], on_pass: Callable[[int], object] = lambda _: None) -> None:
        num = len(self.feed.rows)
        rows = [self.feed.rows[row] if row < num else self.judged_rows[row - num] for row in missing]
        computed = self.scored(model, rows, self.compute_ref_log_probs, on_pass)
        added = {missing[place]: scores for place, scores in computed.items()}
        self._reference |= added
        if self.accelerator.is_main_process:
            self._cache.add(added)

    def _agreed(self, reference: Reference) -> dict[int, Logprobs]:
        """What rank 0 finds on disk: two ranks that looked for themselves could compute different rows."""
        found: list[Any] = [reference.known() if self.accelerator.is_main_process else None]
        broadcast_object_list(found, from_process=0)
        known: dict[int, Logprobs] = found[0]
        return known

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class _Ahead(TrainerCallback):
    """After the clock in the list of callbacks: what it computes belongs to the time of the steps."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
        self.trainer.refer_ahead(state.global_step)

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        if not control.should_training_stop:
            self.trainer.refer_ahead(state.global_step)


def dpo_arguments(bench: Bench) -> DPOConfig:
    settings = bench.order.config.dpo
    return DPOConfig(
        **bench.arguments(),
        max_length=None,
        beta=settings.beta,
        loss_type=[settings.loss_type],
        label_smoothing=settings.label_smoothing,
        router_aux_loss_coef=0.0,  # balanced per pass, which would make the loss depend on how a batch is cut
        disable_dropout=False,
        precompute_ref_log_probs=bench.order.config.method == "full",  # else TRL would load the base a second time
    )


def _after(start: int, progress: Progress) -> Callable[[int], None]:
    return lambda done: progress.at(start + done)


def _summed(outputs: Any, inputs: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    """(better, worse); a soft prompt puts positions of its own before the real ones."""
    width = inputs["input_ids"].shape[1] - 1
    better, worse = outputs.log_probs[:, -width:].sum(1).chunk(2)
    return better, worse
