"""What a reward is told, one class per kind. Imports without torch.

`axis` names what is judged (helpful, safe, novel, explainable, format, exact, ... ) and is the line under which its mean is shown;
`kind` says who judges.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from r1ray.config import Config

__all__ = [
    "CallReward",
    "ExactReward",
    "ExplanationReward",
    "ForbiddenReward",
    "FormatReward",
    "LengthReward",
    "ModelReward",
    "NoveltyReward",
    "OverlapReward",
    "RegexReward",
    "RewardSettings",
]

Part = Literal["answer", "reasoning", "all"]


class _Reward(Config):
    axis: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What is judged; its mean is a line of its own.")
    weight: float = Field(default=1.0, description="Share of this reward in the advantage, after it was normalised; 0 only watches.")


class ExactReward(_Reward):
    """1 when the answer has the reference's words in its order; case, width and punctuation aside."""

    kind: Literal["exact"] = Field(description="The reference's words, all of them.")


class OverlapReward(_Reward):
    """ROUGE-L's F-measure against the reference."""

    kind: Literal["overlap"] = Field(description="The reference's words, as many as there are.")


class FormatReward(_Reward):
    """1 for `<think>reasoning</think>answer` with neither of them empty, each tag once, and the end of turn."""

    kind: Literal["format"] = Field(description="Reasoning between tags, then the answer.")


class LengthReward(_Reward):
    """1 inside the window; n / low below it, 1 - (n - high) / high above it, never below 0."""

    kind: Literal["length"] = Field(description="How long the answer is.")
    low: int = Field(default=1, ge=0, description="Shortest answer that is right.")
    high: int = Field(ge=1, description="Longest answer that is right.")
    unit: Literal["tokens", "characters"] = Field(default="tokens", description="tokens: all that were drawn; characters: the answer's.")

    @model_validator(mode="after")
    def _is_a_window(self) -> LengthReward:
        if self.low > self.high:
            raise ValueError(f"low {self.low} exceeds high {self.high}; swap them")
        return self


class ForbiddenReward(_Reward):
    """1 when no forbidden word and no personal data is in what the model said, reasoning included; else 0."""

    kind: Literal["forbidden"] = Field(description="Words and personal data that must not appear.")
    words: tuple[str, ...] = Field(default=(), description="Forbidden texts; case, width and punctuation aside.")
    personal_data: tuple[Literal["id_card", "bank_card", "mobile", "email"], ...] = Field(
        default=("id_card", "bank_card", "mobile", "email"), description="Kinds of personal data, as r1ray.data.clean.pii finds them."
    )


class NoveltyReward(_Reward):
    """Share of the answer's n-grams that are distinct and that no other answer of its group has."""

    kind: Literal["novelty"] = Field(description="What the group's other answers do not say.")
    ngram: int = Field(default=2, ge=1, le=8, description="Words (Chinese: characters) per n-gram.")


class ExplanationReward(_Reward):
    """Words that give a reason, and citations: each sought thing that is there counts alike."""

    kind: Literal["explanation"] = Field(description="Whether reasons and sources are given.")
    markers: tuple[str, ...] = Field(
        default=("because", "since", "therefore", "so that", "due to", "因为", "由于", "因此", "所以"),
        description="Words that give a reason.",
    )
    wanted: int = Field(default=1, ge=0, description="So many markers are enough; 0 seeks none.")
    citations: bool = Field(default=False, description="Seek a [citation:k] of a passage that the question has, too.")

    @model_validator(mode="after")
    def _seeks_something(self) -> ExplanationReward:
        if not (self.wanted and self.markers) and not self.citations:
            raise ValueError("explanation seeks neither markers nor citations; set wanted to 1 or citations to true")
        return self


class RegexReward(_Reward):
    """1 when the pattern is found."""

    kind: Literal["regex"] = Field(description="A pattern of Python's re.")
    pattern: str = Field(min_length=1, description="Searched for; ^ and $ bind it to the ends.")
    where: Part = Field(default="answer", description="answer, reasoning, or all with its tags.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class ModelReward(_Reward):
    """A reward model of the registry, trained by objective reward."""

    kind: Literal["model"] = Field(description="A registered reward model.")
    model: str = Field(min_length=1, description="Its reference: name, name@alias or name@version.")


class CallReward(_Reward):
    """Your own function, imported on each worker: `def score(answers: Sequence[Answer]) -> Sequence[float]`."""

    kind: Literal["python"] = Field(description="Your own function.")
    call: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="module:function, found on the workers' Python path.")


RewardSettings = Annotated[
    ExactReward
    | OverlapReward
    | FormatReward
    | LengthReward
    | ForbiddenReward
    | NoveltyReward
    | ExplanationReward
    | RegexReward
    | ModelReward
    | CallReward,
    Field(discriminator="kind"),
]
