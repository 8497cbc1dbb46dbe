"""The nouns that stages exchange. Plain, immutable, importable without torch, ray or a cluster.

Small in-memory records are frozen dataclasses; what is written to disk inside an artifact (Sampling, SamplingPolicy,
Manifest) is a frozen pydantic model, so that reading it back validates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Annotations",
    "Artifact",
    "ArtifactKind",
    "Conversation",
    "EntityValue",
    "Manifest",
    "Message",
    "Passage",
    "Preference",
    "Report",
    "Role",
    "Sampling",
    "SamplingPolicy",
    "TemplateInfo",
]

Role = Literal["system", "user", "assistant", "tool"]
ArtifactKind = Literal["full", "adapter", "onnx", "pruned", "reward"]
EntityValue = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What a turn is about (seed 004's schema): one intent and its entities, name -> value."""

    intent: str | None = None
    entities: Mapping[str, EntityValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `reasoning` is the text between <think> tags of an assistant turn, without the tags."""

    role: Role
    content: str
    reasoning: str | None = None
    annotations: Annotations | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One dialogue, oldest turn first. `source` says where it came from (`file:row`) for error messages and lineage."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a better and a worse answer, for preference training."""

    id: str
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A retrieved piece of a document. `score` is the fused rank score, higher is better; `id` is stable over rebuilds."""

    id: str
    text: str
    source: str
    heading: str = ""
    score: float = 0.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(_Record):
    """How the next token is drawn. The defaults are DeepSeek-R1's recommendation (README: temperature 0.5-0.7, 0.6 best, top_p 0.95)."""

    temperature: float = Field(default=0.6, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Nucleus: smallest set of tokens with this probability mass.")
    top_k: int = Field(default=0, ge=0, description="Only the k most likely tokens; 0 is off.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest.")
    repetition_penalty: float = Field(default=1.0, gt=0, le=2, description="Divides the logits of tokens already seen.")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="Subtracted per earlier occurrence in the output (OpenAI).")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="Subtracted once if the token occurred (OpenAI).")
    max_tokens: int = Field(default=512, ge=1, description="Longest answer, reasoning included.")
    stop: tuple[str, ...] = Field(default=(), max_length=16, description="Texts that end the answer; not returned.")
    seed: int | None = Field(default=None, description="Same seed, prompt and settings give the same tokens.")


class SamplingPolicy(_Record):
    """Sampling settings that travel with a version: a default and one per task; a request's own fields win over both."""

    default: Sampling = Field(default_factory=Sampling, description="Used when the request names no known task.")
    tasks: dict[str, Sampling] = Field(default_factory=dict, description="Task name -> settings.")
    provenance: dict[str, Any] = Field(default_factory=dict, description="The sweep that chose them: run id, objectives, data hash.")


class TemplateInfo(_Record):
    """The chat template pair inside an artifact: both files' names and the hash that serving compares."""

    infer: str = Field(default="chat_template.jinja", description="Template for generation, relative to the artifact.")
    train: str = Field(default="chat_template.train.jinja", description="Its training twin with generation marks.")
    sha256: str = Field(description="Hash over both texts; serving refuses an override that differs.")
    thinks: bool = Field(default=False, description="Whether the infer template prefills an opening <think> tag.")


class Manifest(_Record):
    """What an artifact is and where it came from; `manifest.json` beside the weights, written last."""

    name: str = Field(description="Registered model name.")
    kind: ArtifactKind = Field(description="full weights, an adapter on a base, an ONNX export, a pruned or a reward model.")
    family: str = Field(description="transformers' model_type: llama, qwen2, deepseek_v3, ...")
    base: str | None = Field(default=None, description="Registry reference `name@version` of the base of an adapter.")
    base_sha256: str | None = Field(default=None, description="Weights hash of that base; checked before an adapter is put on it.")
    weights_sha256: str = Field(description="Hash over the weight files, in name order.")
    template: TemplateInfo = Field(description="The chat template pair.")
    context_length: int = Field(ge=1, description="Longest sequence in tokens.")
    num_parameters: int = Field(ge=0, description="Parameters stored in this artifact.")
    data_hash: str | None = Field(default=None, description="Hash of the training rows, None for an import.")
    config: dict[str, Any] = Field(default_factory=dict, description="The resolved config of the job that made it.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Final metrics, training and evaluation.")
    parents: tuple[str, ...] = Field(default=(), description="References of the versions it was made from.")
    collection: str | None = Field(default=None, description="Retrieval collection its answers should be grounded in.")
    system_prompt: str | None = Field(default=None, description="System message of its training; serving adds it when a request has none.")
    created_at: str = Field(description="UTC time, ISO 8601.")
    files: dict[str, int] = Field(default_factory=dict, description="Every other file: relative path -> bytes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A complete model directory. `version` is 0 until the registry has numbered it; `policy` is its attached sampling policy."""

    path: Path
    manifest: Manifest
    version: int = 0
    policy: SamplingPolicy | None = None

    @property
    def ref(self) -> str:
        """`name@version`, the form that every command and config takes."""
        return f"{self.manifest.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of one evaluation: named figures over `num_examples` rows, with the rows for a closer look."""

    model: str
    dataset: str
    data_hash: str
    num_examples: int
    metrics: Mapping[str, float]
    examples: tuple[Mapping[str, Any], ...] = ()
