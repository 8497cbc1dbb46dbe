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
    """Loads into and switches inside `model`; switching touches the adapted layers only.

    Inside the model each load has a name of its own, so that one that fails leaves the adapter of that name as it was.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers: list[BaseTunerLayer] = []
        self._inside: dict[str, str] = {}
        self._num_loads = 0
        self._active: str | None = None

    def load(self, name: str, path: Path) -> None:
        """Put the PEFT directory at `path` beside the weights; replaces an adapter of that name.

        Raises:
            AdapterMismatch: no adapter lies there, or it is not one of this model.
        """
        if not (path / "adapter_config.json").is_file():
            raise AdapterMismatch(f"{path} holds no adapter_config.json. Give the directory of a PEFT adapter.")
        self._num_loads += 1
        inside = f"load{self._num_loads}"
        try:
            self._inject(inside, path)
        except Exception as error:  # whatever PEFT or safetensors say of it
            self._delete(inside)
            raise AdapterMismatch(
                f"The adapter at {path} does not fit {type(self._model).__name__}: {error}. Train it on this base."
            ) from error
        if name in self._inside:
            self.unload(name)
        self._inside[name] = inside
        log.info("adapter %s loaded from %s", name, path)

    def unload(self, name: str) -> None:
        """Give its memory back."""
        self._delete(self._inside.pop(name))

    def activate(self, name: str | None) -> None:
        """None is the plain model."""
        if name == self._active:
            return
        for layer in self._layers:
            if name is not None:
                layer.set_adapter(self._inside[name], inference_mode=True)
            layer.enable_adapters(name is not None)
        self._active = name

    def _inject(self, inside: str, path: Path) -> None:
        config = PeftConfig.from_pretrained(path)
        config.inference_mode = True
        inject_adapter_in_model(config, self._model, adapter_name=inside)
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in load_peft_weights(path, device="cpu").items()}
        outcome = set_peft_model_state_dict(self._model, weights, adapter_name=inside)
        if outcome.unexpected_keys:
            raise ValueError(f"{len(outcome.unexpected_keys)} tensors have no place in it, first {outcome.unexpected_keys[0]}")
        for parameter_name, parameter in self._model.named_parameters():
            if f".{inside}." in parameter_name:
                parameter.data = parameter.data.to(self._model.device, self._model.dtype)
        self._model.eval()
        self._look_again()

    def _delete(self, inside: str) -> None:
        self._look_again()
        for layer in self._layers:
            layer.set_adapter([])  # PEFT would choose another one in its place
            layer.delete_adapter(inside)
        getattr(self._model, "peft_config", {}).pop(inside, None)

    def _look_again(self) -> None:
        """The adapted layers have changed, and PEFT has switched them: the next pass switches them back, whatever it needs."""
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        self._active = ""
        self.activate(None)
