"""Answers of a chat model in a local directory, for operations that want another wording: no server and no cluster.

Any causal language model with a chat template will do; it is loaded when it is first asked. Knows no dialogue.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from r1ray.data.augment.config import LocalConfig
from r1ray.errors import InvalidValue
from r1ray.model.reasoning import split
from r1ray.settings import Settings

__all__ = ["LocalWriter", "plain"]

_log = logging.getLogger(__name__)


class LocalWriter:
    """`batch_size` prompts at a time, similar lengths together; the same seed and prompts give the same answers."""

    def __init__(self, config: LocalConfig) -> None:
        self._config = config
        self._loaded: tuple[Any, Any] | None = None

    def answers(self, prompts: Sequence[str], seed: int) -> list[str]:
        """One answer per prompt; empty where the model said nothing.

        Raises:
            InvalidValue: no chat model in the directory.
        """
        tokenizer, _ = self._model()
        asked = [self._rendered(tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(asked)), key=lambda place: (len(asked[place]), place))
        said = [""] * len(asked)
        for start in range(0, len(order), self._config.batch_size):
            places = order[start : start + self._config.batch_size]
            for place, text in zip(places, self._written([asked[place] for place in places], seed), strict=True):
                said[place] = plain(text)
        return said

    def _written(self, texts: Sequence[str], seed: int) -> list[str]:
        import torch

        tokenizer, model = self._model()
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        heat = self._config.temperature
        drawn = {"do_sample": True, "temperature": heat, "top_k": 0, "top_p": 1.0} if heat else {"do_sample": False}
        drawing = hashlib.sha256(repr((seed, texts)).encode("utf-8", "surrogatepass")).digest()
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(int.from_bytes(drawing[:7]))
            ids = model.generate(**batch, **drawn, max_new_tokens=self._config.max_tokens, pad_token_id=tokenizer.pad_token_id)
        decoded: list[str] = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return decoded

    def _rendered(self, tokenizer: Any, prompt: str) -> str:
        text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        return text

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            path = Settings().locate(self._config.model)
            try:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
                model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto").eval()
            except (OSError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise InvalidValue(f"No language model in {path}: {reason} Set local.model to a directory of one.") from error
            if tokenizer.chat_template is None:
                raise InvalidValue(f"{path} has no chat template, so it cannot be asked. Take an instruct model.")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            _log.info("wordings by the model in %s", path)
            self._loaded = tokenizer, model
        return self._loaded


def plain(answer: str) -> str:
    """An answer's text without reasoning and quotation marks."""
    if "</think>" in answer:
        _, answer = split(answer, "<think>" not in answer)
    return answer.strip().strip("\"'“”「」").strip()
