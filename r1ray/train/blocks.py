"""What one objective of training is told: `train.dpo`, `train.reward`, `train.grpo`, `train.distill`. Imports without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.train.rewards.config import RewardSettings

__all__ = ["DistillSettings", "DpoSettings", "GrpoSettings", "RewardModelSettings"]


class DpoSettings(Config):
    """Making the better of two answers likelier than the worse one, measured against the base (DPO, arXiv 2305.18290)."""

    beta: float = Field(default=0.1, gt=0, description="How strongly the base holds back; for ipo its tau.")
    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
    ] = Field(default="sigmoid", description="TRL's loss of that name: sigmoid is DPO, ipo overfits less, robust takes noisy preferences.")
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of preferences that are the wrong way round; for robust (0.1) and exo_pair (1e-3).",
    )
    sft_weight: float = Field(
        default=0.0, ge=0, description="Weight of the better answer's own loss per token, against losing its likelihood (arXiv 2404.19733)."
    )
    eval_share: float = Field(default=0.1, ge=0, lt=1, description="Share of prompts held out, by train.seed, to measure before and after.")
    eval_limit: int = Field(default=400, ge=1, description="No more prompts are held out than have so many pairs, whatever the share.")

    @model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> DpoSettings:
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(
                f"dpo.label_smoothing {self.label_smoothing:g} has no effect in loss_type {self.loss_type}; set dpo.loss_type=robust, or 0"
            )
        if self.loss_type in ("robust", "exo_pair") and not self.label_smoothing:
            raise ValueError(f"dpo.loss_type {self.loss_type} wants a label_smoothing above 0; set 0.1 for robust, 1e-3 for exo_pair")
        return self


class RewardModelSettings(Config):
    """A model that gives an answer a number, learnt from which of two is better (Bradley-Terry, arXiv 2203.02155)."""

    center: float = Field(
        default=0.01, ge=0, description="Weight of the squared sum of a pair's rewards, which keeps them around 0 (arXiv 2312.09244)."
    )
    eval_share: float = Field(default=0.1, ge=0, lt=1, description="Share of prompts held out, by train.seed, to measure before and after.")
    eval_limit: int = Field(default=400, ge=1, description="No more prompts are held out than have so many pairs, whatever the share.")


class GrpoSettings(Config):
    """Reinforcement learning by comparing a group of answers to the same prompt (GRPO, arXiv 2402.03300)."""

    num_generations: int = Field(default=8, ge=2, le=256, description="Answers to each prompt, which are compared with one another.")
    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer in tokens, reasoning included.")
    temperature: float = Field(default=1.0, gt=0, le=2, description="Of the answers' sampling; 1 learns what it samples.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the answers' sampling; 1 samples from everything.")
    loss: Literal["dapo", "grpo", "dr_grpo"] = Field(
        default="dapo",
        description="Mean over all tokens (dapo), over answers of their tokens' mean (grpo), or of their sum / max_new_tokens (dr_grpo).",
    )
    beta: float = Field(default=0.0, ge=0, description="Weight of the divergence from the base; 0 computes none.")
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="A token counts no further than to a probability ratio of 1 - epsilon.")
    epsilon_high: float | None = Field(default=None, gt=0, description="The same upwards, 1 + epsilon_high (0.28: DAPO); null: epsilon.")
    rewards: tuple[RewardSettings, ...] = Field(default=(), description="Who judges the answers, each on its own axis.")
    rollouts: Literal["auto", "engine", "transformers"] = Field(
        default="auto", description="What writes the answers: r1ray's engine, or the trained model itself; auto: the engine where it can."
    )
    num_held_out: int = Field(
        default=32, ge=0, description="Prompts kept from training and answered greedily before and after; at most a fifth; 0: none."
    )

    @model_validator(mode="after")
    def _knows_what_counts(self) -> GrpoSettings:
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("every reward has weight 0, so nothing would be learned; give at least one a weight")
        return self


class DistillSettings(Config):
    """Learning from a larger model: from the texts that it writes, or from its probabilities."""

    teacher: str | None = Field(default=None, min_length=1, description="Registry reference of the model to learn from.")
    mode: Literal["logits", "texts"] = Field(
        default="logits",
        description="logits: its probabilities at the data's answers; texts: its answers to the data's questions.",
    )
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        default="forward",
        description="forward: KL(teacher, student), covers all it says; reverse: the other way, seeks its mode; jsd.",
    )
    temperature: float = Field(default=1.0, gt=0, le=20, description="Softens both distributions; the loss is multiplied by its square.")
    alpha: float = Field(default=1.0, ge=0, le=1, description="Share of the divergence; the rest is the data's own next token.")
    max_new_tokens: int = Field(default=512, ge=1, description="texts: longest answer of the teacher.")
    sample_temperature: float = Field(default=0.0, ge=0, le=2, description="texts: of the teacher's sampling; 0 is greedy.")
