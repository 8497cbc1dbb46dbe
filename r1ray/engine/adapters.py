"""PEFT adapters beside a model's weights, one of them active at a time. Knows no request: the runner says which one a pass needs."""

from __future__ import annotations

import logging
from pathlib import Path

from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from r1ray.errors import AdapterMismatch

__all__ = ["Adapters"]

log = logging.getLogger(__name__)

PREFIX = "base_model.model."  # PEFT saves the names of its own wrapper


class Adapters:
    """Loads into and switches inside `model`; switching touches the adapted layers only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers: list[BaseTunerLayer] = []
        self._active: str | None = None
        self.names: frozenset[str] = frozenset()

    def load(self, name: str, path: Path) -> None:
        """Put the PEFT directory at `path` beside the weights; replaces an adapter of that name.

        Raises:
            AdapterMismatch: no adapter lies there, or it is not one of this model.
        """
        if not (path / "adapter_config.json").is_file():
            raise AdapterMismatch(f"{path} holds no adapter_config.json. Give the directory of a PEFT adapter.")
        self._delete(name)
        try:
            self._inject(name, path)
        except (ValueError, RuntimeError, KeyError) as error:
            self._delete(name)
            raise AdapterMismatch(
                f"The adapter at {path} does not fit {type(self._model).__name__}: {error}. Train it on this base."
            ) from error
        self.names |= {name}
        log.info("adapter %s loaded from %s", name, path)

    def activate(self, name: str | None) -> None:
        """None is the plain model."""
        if name == self._active:
            return
        for layer in self._layers:
            if name is not None:
                layer.set_adapter(name, inference_mode=True)
            layer.enable_adapters(name is not None)
        self._active = name

    def _inject(self, name: str, path: Path) -> None:
        config = PeftConfig.from_pretrained(path)
        config.inference_mode = True
        inject_adapter_in_model(config, self._model, adapter_name=name)
        self._layers = [m for m in self._model.modules() if isinstance(m, BaseTunerLayer)]
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in load_peft_weights(path, device="cpu").items()}
        outcome = set_peft_model_state_dict(self._model, weights, adapter_name=name)
        if outcome.unexpected_keys:
            raise ValueError(f"{len(outcome.unexpected_keys)} tensors have no place in it, first {outcome.unexpected_keys[0]}")
        for parameter_name, parameter in self._model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.data = parameter.data.to(self._model.device, self._model.dtype)
        self._model.eval()
        self._active = ""  # injecting has switched the layers: the next pass switches them back, whatever it needs
        self.activate(None)

    def _delete(self, name: str) -> None:
        self.names -= {name}
        for layer in self._layers:
            layer.delete_adapter(name)
