"""The chat template pair of a model, inside its artifact: one text for generation, its twin for training.

Training and serving both go through this module, so a model is asked in the very form it was taught. A conversation becomes
token ids here and nowhere else. It knows no data set, no engine and no HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.errors import ArtifactInvalid, TemplateMismatch, TemplateNotTrainable
from r1ray.model.reasoning import CLOSE, OPEN
from r1ray.model.twin import has_marks, prefills_think, training_twin
from r1ray.types import Artifact, Message, TemplateInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TemplatePair",
    "answer_ids",
    "check_override",
    "pair_for",
    "prompt_ids",
    "read",
    "shipped",
    "training_ids",
    "write",
]


@dataclass(frozen=True, slots=True)
class TemplatePair:
    """Two Jinja texts. `thinks`: the infer template's prompt ends with `<think>`, so the output starts inside the reasoning."""

    infer: str
    train: str
    thinks: bool

    @property
    def sha256(self) -> str:
        """Hash over both texts: what training records and serving compares."""
        return hashlib.sha256(f"{self.infer}\0{self.train}".encode()).hexdigest()

    @property
    def trainable(self) -> bool:
        """Whether the training text marks the assistant's tokens; a template whose twin cannot be derived does not."""
        return has_marks(self.train)


def pair_for(infer_template: str) -> TemplatePair:
    """The pair of a shipped template.

    A template with generation marks of its own is its own twin. One without a derivable twin keeps its own text for both:
    it can be served, and training refuses it.

    Raises:
        UnsupportedModel: the text renders no conversation.
    """
    thinks = prefills_think(infer_template)
    return TemplatePair(infer=infer_template, train=training_twin(infer_template) or infer_template, thinks=thinks)


def shipped(name: str) -> str:
    """The text of one of the templates in this package: `deepseek_r1` as every R1 checkpoint has it, `chatml`, `plain`."""
    return (files("r1ray.model") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def write(pair: TemplatePair, directory: Path) -> TemplateInfo:
    """Both texts into an artifact's directory; gives the manifest's entry."""
    info = TemplateInfo(sha256=pair.sha256, thinks=pair.thinks)
    (directory / info.infer).write_text(pair.infer, encoding="utf-8")
    (directory / info.train).write_text(pair.train, encoding="utf-8")
    return info


def read(artifact: Artifact) -> TemplatePair:
    """The pair of an artifact.

    Raises:
        ArtifactInvalid: a text is missing or is not the one that the manifest was sealed with.
    """
    info = artifact.manifest.template
    try:
        infer, train = ((artifact.path / name).read_text(encoding="utf-8") for name in (info.infer, info.train))
    except OSError as error:
        raise ArtifactInvalid(f"{artifact.path} misses a chat template: {error}. Restore it, or register the model again.") from error
    pair = TemplatePair(infer=infer, train=train, thinks=info.thinks)
    if pair.sha256 != info.sha256:
        raise ArtifactInvalid(f"A chat template in {artifact.path} was altered after {artifact.ref} was registered. Restore it.")
    return pair


def check_override(artifact: Artifact, override: str | None) -> None:
    """Refuse to run a model under another template than the one it was trained with.

    Raises:
        TemplateMismatch: `override` differs from the artifact's infer template in more than white space at its end.
    """
    if override is None or override.rstrip() == read(artifact).infer.rstrip():
        return
    wanted, given = artifact.manifest.template.sha256[:12], hashlib.sha256(override.encode()).hexdigest()[:12]
    raise TemplateMismatch(
        f"{artifact.ref} was trained with its own chat template (pair {wanted}); the override (text {given}) differs and would "
        "degrade its answers. Drop the override, or import the model again with chat_template=FILE and train that."
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, system_prompt: str | None = None) -> list[int]:
    """Token ids that the model completes: the turns so far and the generation prompt, under the infer template.

    Earlier turns go in without their reasoning, as R1's template and documentation want it. A system message among
    `messages` wins over `system_prompt`, and either replaces a template's built-in one.
    """
    turns = [_turn(message.role, message.content) for message in _with_system(messages, system_prompt)]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def training_ids(
    train_tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, system_prompt: str | None = None
) -> tuple[list[int], list[int]]:
    """(input ids, assistant mask) of a whole conversation under the training template.

    The mask is 1 for what the model must learn to say: each assistant turn's `<think>` text, its answer and its end-of-turn token.

    Args:
        train_tokenizer: From `load.training_tokenizer`.

    Raises:
        TemplateNotTrainable: the tokenizer's template does not mark the assistant's tokens.
    """
    template = train_tokenizer.chat_template
    if not isinstance(template, str) or not has_marks(template):
        raise TemplateNotTrainable(
            "The chat template does not mark the assistant's tokens and no training twin could be derived from it. "
            "Import the model with chat_template=FILE, where FILE wraps assistant text in {% generation %}...{% endgeneration %}."
        )
    turns = [_turn(message.role, _in_full(message)) for message in _with_system(messages, system_prompt)]
    encoded = train_tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def answer_ids(
    train_tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: Message, *, system_prompt: str | None = None
) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of one exchange under the training template; the answer ends with its end-of-turn token.

    Raises:
        TemplateNotTrainable: the tokenizer's template does not mark the assistant's tokens.
    """
    ids, mask = training_ids(train_tokenizer, (*prompt, answer), system_prompt=system_prompt)
    end = next((place + 1 for place in range(len(mask) - 1, -1, -1) if mask[place]), 0)
    start = next((place + 1 for place in range(end - 1, -1, -1) if not mask[place]), 0)
    return ids[:start], ids[start:end]


def _with_system(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    if system_prompt is None or any(message.role == "system" for message in messages):
        return messages
    return (Message(role="system", content=system_prompt), *messages)


def _in_full(message: Message) -> str:
    """An assistant turn as the model said it; the line breaks are R1's."""
    if message.role != "assistant" or message.reasoning is None:
        return message.content
    return f"{OPEN}\n{message.reasoning.strip()}\n{CLOSE}\n\n{message.content}"


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
