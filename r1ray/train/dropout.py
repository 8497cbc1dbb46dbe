"""`train.dropout` for a base: attention weights, and hidden states where the architecture has a place for it.

Knows no training: it sets numbers in modules, before an adapter with a dropout of its own is put on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1ray.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["set_dropout"]

_NUMBERS = ("attention_dropout", "hidden_dropout")


def set_dropout(model: PreTrainedModel, share: float) -> int:
    """How many modules drop `share` of what goes through them from now on, while training.

    Raises:
        UnsupportedModel: the architecture has no dropout anywhere.
    """
    from torch import nn

    num_modules = 0
    for module in model.modules():
        places = [name for name in _NUMBERS if isinstance(getattr(module, name, None), float)]
        if isinstance(module, nn.Dropout):
            places.append("p")
        for name in places:
            setattr(module, name, share)
        num_modules += bool(places)
    if num_modules == 0:
        raise UnsupportedModel(
            f"train.dropout={share:g}, but {type(model).__name__} has no dropout to set. Set it to 0; train.lora.dropout works everywhere."
        )
    return num_modules
