"""What one objective of training is told: `train.grpo`, `train.distill`. Imports without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.train.rewards.config import RewardSettings

__all__ = ["DistillSettings", "GrpoSettings"]


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
    epsilon: float = Field(
        default=0.2, gt=0, lt=1, description="An answer's token counts no further than 1 - epsilon in probability ratio."
    )
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
        description="logits: its probabilities at the data's answers; texts: answers that it writes to the data's questions.",
    )
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        default="forward",
        description="forward: KL(teacher, student), covers all it says; reverse: KL(student, teacher), seeks its mode; jsd.",
    )
    temperature: float = Field(default=1.0, gt=0, le=20, description="Softens both distributions; the loss is multiplied by its square.")
    alpha: float = Field(default=1.0, ge=0, le=1, description="Share of the divergence; the rest is the data's own next token.")
    max_new_tokens: int = Field(default=512, ge=1, description="texts: longest answer of the teacher.")
    sample_temperature: float = Field(default=0.0, ge=0, le=2, description="texts: of the teacher's sampling; 0 is greedy.")
