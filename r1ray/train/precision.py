"""Whether the GPUs of a training multiply its number type: looked at where they are seen, told to all ranks.

The driver chooses bfloat16 for GPUs without having one. Those before compute capability 8.0 (V100, T4, RTX 20) have none. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from r1ray.errors import InvalidValue
from r1ray.train.order import WorkOrder
from r1ray.train.peers import Peers

__all__ = ["check_dtype"]


def check_dtype(order: WorkOrder, peers: Peers, look: Callable[[], str | None] | None = None) -> None:
    """On every rank, before anything is loaded; all ranks raise the same.

    Args:
        look: Names this rank's GPU where it has no bfloat16, else None.

    Raises:
        InvalidValue: the training is in bfloat16, and a worker's GPU has none.
    """
    if not order.config.use_gpu or order.dtype != "bfloat16":
        return
    lacking = peers.gathered((look or _without_bfloat16)())
    rank, name = next(((rank, name) for rank, name in enumerate(lacking) if name is not None), (0, None))
    if name is not None:
        chosen = "auto, which is bfloat16 on GPUs" if order.config.dtype == "auto" else order.config.dtype
        raise InvalidValue(
            f"train.dtype={chosen}: {name} of worker {rank} has no bfloat16. Set train.dtype=float16, whose loss is scaled, or float32."
        )


def _without_bfloat16() -> str | None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"the {torch.cuda.get_device_name()} (compute capability {major}.{minor})"
