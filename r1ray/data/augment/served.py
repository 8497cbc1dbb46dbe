"""Back-translation and rewriting by any model behind an OpenAI-compatible URL, or in a local directory. Knows no engine.

A new wording is taken only if it is new, keeps the language and every annotated value, and is neither much longer nor much shorter: a model
that answers instead of translating makes no row.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from r1ray.data.augment.config import BackTranslationConfig, RewriteConfig, ServedConfig
from r1ray.data.augment.local import LocalWriter, plain
from r1ray.data.augment.provenance import Made, recorded
from r1ray.data.augment.spans import bounded, entities_of, question_start
from r1ray.errors import InvalidValue, ServerUnreachable
from r1ray.model.prompts import Language, detect_language
from r1ray.types import Conversation

__all__ = ["BackTranslation", "ChatClient", "Rewriting"]

_TRANSLATE: dict[Language, str] = {
    "en": "Translate the following message into Chinese. Answer with the translation only.\n\n{text}",
    "zh": "把下面这句话翻译成英文，只回答译文。\n\n{text}",
}
_REWRITE: dict[Language, str] = {
    "en": "Say the following customer message in other words. Keep its meaning, every number and every name. Answer with the message only."
    "\n\n{text}",
    "zh": "换一种说法重写下面这句客户的话，保持意思、数字和名称不变，只回答重写后的句子。\n\n{text}",
}
_LENGTHS = (0.4, 2.5)  # of the old wording
_log = logging.getLogger(__name__)


class ChatClient:
    """One question, one answer; failed requests are repeated, with growing pauses."""

    def __init__(self, config: ServedConfig) -> None:
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            if not os.environ.get(config.api_key_env):
                raise InvalidValue(f"The environment has no {config.api_key_env}. Export it, or set api_key_env to null.")
            self._headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"

    def answers(self, prompts: Sequence[str], seed: int) -> list[str]:
        """One answer per prompt, `concurrency` at a time.

        Raises:
            ServerUnreachable: the server does not answer, or not with an OpenAI chat completion.
        """
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            return list(pool.map(lambda prompt: self._answer(prompt, seed), prompts))

    def _answer(self, prompt: str, seed: int) -> str:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "seed": seed,
        }
        for attempt in range(self._config.retries + 1):
            try:
                return _content(self._post(body))
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                if attempt == self._config.retries or (isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404)):
                    raise ServerUnreachable(
                        f"{self._url} gave no chat completion for model {self._config.model!r}: {error}. "
                        "Start the server, or correct base_url and model of the operation."
                    ) from error
                time.sleep(0.5 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self._config.timeout_s) as response:
            return json.load(response)


class _Writer(Protocol):
    def answers(self, prompts: Sequence[str], seed: int) -> list[str]:
        """One answer per prompt."""


def _writer(config: BackTranslationConfig | RewriteConfig) -> _Writer:
    if config.served is not None:
        return ChatClient(config.served)
    assert config.local is not None, "checked by the config"
    return LocalWriter(config.local)


class BackTranslation:
    """Into the other language and back."""

    name = "back_translation"

    def __init__(self, config: BackTranslationConfig, seed: int) -> None:
        self._writer = _writer(config)
        self._seed = seed

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        texts = [_question(row)[1] for row in rows]
        languages = [detect_language(text) for text in texts]
        there = self._writer.answers([_TRANSLATE[lang].format(text=text) for text, lang in zip(texts, languages, strict=True)], self._seed)
        back = [_TRANSLATE["zh" if lang == "en" else "en"].format(text=text) for text, lang in zip(there, languages, strict=True)]
        return _made(rows, self._writer.answers(back, self._seed), self.name, self._seed)


class Rewriting:
    """The same in other words."""

    name = "rewrite"

    def __init__(self, config: RewriteConfig, seed: int) -> None:
        self._writer = _writer(config)
        self._seed = seed

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        texts = [_question(row)[1] for row in rows]
        prompts = [_REWRITE[detect_language(text)].format(text=text) for text in texts]
        return _made(rows, self._writer.answers(prompts, self._seed), self.name, self._seed)


def _content(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("the answer has no text")
    return plain(content)


def _question(row: Conversation) -> tuple[int, str]:
    """(turn, the customer's own words) of the last question."""
    turn = max(place for place, m in enumerate(row.messages) if m.role == "user")
    text = row.messages[turn].content
    return turn, text[question_start(text) :].strip()


def _made(rows: Sequence[Conversation], wordings: Sequence[str], name: str, seed: int) -> list[Made | None]:
    made: list[Made | None] = []
    for row, wording in zip(rows, wordings, strict=True):
        turn, old = _question(row)
        if not _keeps(row, old, wording):
            made.append(None)
            continue
        text = row.messages[turn].content
        messages = list(row.messages)
        messages[turn] = replace(messages[turn], content=text[: text.rindex(old)] + wording)
        made.append(recorded(row, messages, name=name, seed=seed))
    return made


def _keeps(row: Conversation, old: str, new: str) -> bool:
    if not new or new.casefold() == old.casefold() or detect_language(new) != detect_language(old):
        return False
    if not _LENGTHS[0] <= len(new) / max(len(old), 1) <= _LENGTHS[1]:
        return False
    named = [bounded(value) for value in entities_of(row).values() if str(value).strip() and not isinstance(value, bool)]
    return all(pattern.search(new) for pattern in named if pattern.search(old))
