"""The rules that look at one dialogue alone: mangled text, language, length. Each gives a reason or nothing."""

from __future__ import annotations

from r1ray.data.clean.language import DetectedLanguage, language_of
from r1ray.data.mangled import mangled
from r1ray.data.prepare.config import CleanConfig, LengthConfig
from r1ray.types import Conversation

__all__ = ["Broken", "check"]


class Broken(Exception):
    """A dialogue that a rule drops; `step` names the rule, the text says why."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


def check(conversation: Conversation, config: CleanConfig) -> DetectedLanguage:
    """The dialogue's language, or Broken with the first rule that drops it."""
    text = "\n".join(message.content for message in conversation.messages if message.role != "system")
    if (found := mangled(text)).share > config.max_garbage_share:
        raise Broken("mangled", f"{found}, more than {config.max_garbage_share:.1%}")
    if problem := _length(conversation, len(text), config.length):
        raise Broken("length", problem)
    language = language_of(text)
    if config.languages is not None and language not in config.languages:
        raise Broken("language", f"language {language}, kept are {', '.join(config.languages)}")
    return language


def _length(conversation: Conversation, num_chars: int, limits: LengthConfig) -> str | None:
    if len(conversation.messages) > limits.max_turns:
        return f"{len(conversation.messages)} turns, more than {limits.max_turns}"
    if num_chars > limits.max_dialogue:
        return f"{num_chars} characters, more than {limits.max_dialogue}"
    for position, message in enumerate(conversation.messages, start=1):
        length = len(message.content.strip())
        if message.role == "user" and not limits.min_question <= length <= limits.max_question:
            return f"turn {position} is a question of {length} characters, outside {limits.min_question} to {limits.max_question}"
        if message.role == "assistant" and length < limits.min_answer:
            return f"turn {position} is an answer of {length} characters, fewer than {limits.min_answer}"
    return None
