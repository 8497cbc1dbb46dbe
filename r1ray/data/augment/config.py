"""Which operations make new rows, how often, and with what. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config

__all__ = [
    "AugmentConfig",
    "BackTranslationConfig",
    "EntitiesConfig",
    "LocalConfig",
    "MaskedConfig",
    "OperationConfig",
    "RewriteConfig",
    "ServedConfig",
    "SynonymsConfig",
    "SyntaxConfig",
    "TrapsConfig",
    "TreesConfig",
]

Probability = Annotated[float, Field(ge=0, le=1)]


class SynonymsConfig(Config):
    """Words by synonyms (seed 001), never inside an entity's value."""

    type: Literal["synonyms"] = Field(default="synonyms", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")
    probability: float = Field(default=0.5, gt=0, le=1, description="Chance of each word that has a synonym to be replaced.")
    lexicon: Path | None = Field(default=None, description="YAML: language -> groups of synonyms; null: the shipped ones.")


class EntitiesConfig(Config):
    """Annotated entities by other values of the same entity (seed 004), in every turn and the annotations."""

    type: Literal["entities"] = Field(default="entities", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")
    values: Path | None = Field(default=None, description="YAML: entity -> values; null: the values that the set itself holds.")


class SyntaxConfig(Config):
    """The same request in another form (seed 001: grammatical variants), by rules."""

    type: Literal["syntax"] = Field(default="syntax", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")
    rules: Path | None = Field(default=None, description="YAML: language -> [pattern, replacements]; null: the shipped ones.")


class MaskedConfig(Config):
    """Tokens by what a masked language model puts in their place (seed 000)."""

    type: Literal["masked"] = Field(default="masked", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")
    model: Path = Field(description="Local directory of a masked language model, e.g. bert-base-chinese.")
    probability: float = Field(default=0.3, gt=0, le=1, description="Share of the tokens that is replaced; seed 000: 30 %.")
    top_k: int = Field(default=5, ge=1, description="The replacement is drawn among so many likeliest tokens.")
    batch_size: int = Field(default=16, ge=1, description="Texts per forward pass.")


class ServedConfig(Config):
    """A model behind an OpenAI-compatible URL."""

    base_url: str = Field(description="Such as http://127.0.0.1:8000/v1.")
    model: str = Field(description="The model's name there.")
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key; null: no key.")
    temperature: float = Field(default=0.7, ge=0, le=2, description="Of the answers.")
    max_tokens: int = Field(default=256, ge=1, description="Longest answer.")
    concurrency: int = Field(default=4, ge=1, description="Requests at a time.")
    timeout_s: float = Field(default=60, gt=0, description="Of one request.")
    retries: int = Field(default=2, ge=0, description="Further attempts after a failed request.")


class LocalConfig(Config):
    """A chat model in a local directory, computed in the job itself."""

    model: Path = Field(description="Directory of a causal language model with a chat template.")
    temperature: float = Field(default=0.7, ge=0, le=2, description="Of the answers; 0 is greedy.")
    max_tokens: int = Field(default=256, ge=1, description="Longest answer.")
    batch_size: int = Field(default=8, ge=1, description="Answers at a time.")


class _Written(Config):
    served: ServedConfig | None = Field(default=None, description="A model behind a URL; this or local.")
    local: LocalConfig | None = Field(default=None, description="A model in a local directory; this or served.")

    @model_validator(mode="after")
    def _has_one_writer(self) -> Self:
        if (self.served is None) == (self.local is None):
            raise ValueError("a model has to write the wordings: set served (a URL) or local (a directory), not both")
        return self


class BackTranslationConfig(_Written):
    """Into the other language and back (seeds 001, 004)."""

    type: Literal["back_translation"] = Field(default="back_translation", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")


class RewriteConfig(_Written):
    """The same request in a model's other words."""

    type: Literal["rewrite"] = Field(default="rewrite", description="Name of the operation.")
    share: Probability = Field(default=0.1, description="Share of the rows that it is tried on.")


class TrapsConfig(Config):
    """Adversarial rows (seed 000: logic traps): a distractor, two values that contradict each other, a converse that does not follow."""

    type: Literal["traps"] = Field(default="traps", description="Name of the operation.")
    share: Probability = Field(default=0.05, description="Share of the rows that it is tried on.")
    kinds: tuple[Literal["distractor", "conflict", "converse"], ...] = Field(
        default=("distractor", "conflict", "converse"), min_length=1, description="Which traps."
    )
    wording: Path | None = Field(default=None, description="YAML in the shipped file's form; null: the shipped ones.")


class TreesConfig(Config):
    """Dialogues out of a template's branches (seed 004: dialogue-tree expansion)."""

    type: Literal["trees"] = Field(default="trees", description="Name of the operation.")
    path: Path = Field(description="YAML of trees; docs/data.md has the form.")
    num: int = Field(default=100, ge=1, description="Most dialogues per tree.")


OperationConfig = Annotated[
    SynonymsConfig | EntitiesConfig | SyntaxConfig | MaskedConfig | BackTranslationConfig | RewriteConfig | TrapsConfig | TreesConfig,
    Field(discriminator="type"),
]


class AugmentConfig(Config):
    """Every operation is seeded, named in the rows that it makes, and can be undone from what they record."""

    operations: tuple[OperationConfig, ...] = Field(default=(), description="Each makes rows of its own out of the kept domain rows.")
    max_share: float = Field(default=0.3, ge=0, lt=1, description="Largest share of made rows in the result; shares are scaled down to it.")
