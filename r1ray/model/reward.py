"""Reward models: a base with a head that gives an answer one number, higher is better.

    judge = load_reward_model(registry.resolve("judge"), registry=registry)
    judge.score([prompt, prompt], ["an answer", "another one"])        # -> floats

An artifact of kind `reward` holds an adapter with the head, or all weights. Numbers of one model compare answers to the same prompt;
those of two models do not compare. Knows no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r1ray.errors import ArtifactInvalid, PromptTooLong, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import HEAD
from r1ray.model.load import Dtype, base_of, choose_dtype, training_tokenizer
from r1ray.registry import Registry
from r1ray.types import Artifact, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RewardModel", "load_reward_model", "load_with_head"]


class _ExactHead(torch.nn.Linear):
    """In float32: bfloat16 would round a reward of 3 to steps of 0.016, and make level what is not."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.float() * self.weight[0].float()).sum(-1, keepdim=True)


def load_with_head(directory: Path, *, dtype: str, pad_id: int, device: str = "cpu") -> PreTrainedModel:
    """The model of a directory with the head for one number: its own, or where it has none a random one by torch's seed.

    Raises:
        UnsupportedModel: transformers has no sequence classification for the architecture.
        ArtifactInvalid: a tensor that the architecture needs is not in the files.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(directory, num_labels=1)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedModel(f"transformers has no scoring head for {config.model_type}. Train the reward model on another base.")
    config.get_text_config().pad_token_id = pad_id  # the head reads the last position that is no padding
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the new head
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=None if device == "cpu" else {"": device},
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(told)
    model, report = loaded
    if missing := sorted(set(report["missing_keys"]) - {HEAD}):
        raise ArtifactInvalid(f"{directory} lacks {len(missing)} tensors, first {missing[0]}. Import the complete model again.")
    model.score.__class__ = _ExactHead
    return model


def load_reward_model(artifact: Artifact, *, registry: Registry, dtype: Dtype = "auto", device: str = "cpu") -> RewardModel:
    """In evaluation mode on `device`.

    Raises:
        UnsupportedModel: the artifact is no reward model.
        AdapterMismatch: its base has other weights than it was trained on.
    """
    manifest = artifact.manifest
    if manifest.kind != "reward":
        raise UnsupportedModel(
            f"{artifact.ref} is of kind {manifest.kind}, no reward model. Train one with train.objective=reward, or name its version."
        )
    wanted = str(choose_dtype(device)[0]).removeprefix("torch.") if dtype == "auto" else dtype
    tokenizer = training_tokenizer(artifact)
    directory = artifact.path if manifest.base is None else base_of(artifact, registry).path
    model: Any = load_with_head(directory, dtype=wanted, pad_id=tokenizer.pad_token_id or 0)
    if manifest.base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, artifact.path, autocast_adapter_dtype=False)
    return RewardModel(artifact, model.to(torch.device(device)).eval(), tokenizer)


class RewardModel:
    """Scores answers. `artifact` is of kind `reward`."""

    def __init__(self, artifact: Artifact, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.artifact, self._model, self._tokenizer = artifact, model, tokenizer
        self._pad_id = tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[Message | str], *, batch_size: int = 8) -> list[float]:
        """A number per answer, in order. The artifact's system prompt stands where a prompt has none, as in training.

        Raises:
            PromptTooLong: a prompt and its answer exceed the model's context.
        """
        rows = [self._ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for place, value in zip(places, self._forward([rows[place] for place in places]), strict=True):
                scores[place] = value
        return scores

    def _ids(self, prompt: Sequence[Message], answer: Message | str) -> list[int]:
        turn = Message(role="assistant", content=answer) if isinstance(answer, str) else answer
        asked, said = template.answer_ids(self._tokenizer, prompt, turn, system_prompt=self.artifact.manifest.system_prompt)
        limit = self.artifact.manifest.context_length
        if len(asked) + len(said) > limit:
            raise PromptTooLong(f"Prompt and answer have {len(asked) + len(said)} tokens; {self.artifact.ref} takes {limit}. Shorten them.")
        return asked + said

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._pad_id] * (longest - len(row))] for row in rows], device=self._model.device)
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._model.device)
        values: list[float] = self._model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, 0].float().tolist()
        return values
