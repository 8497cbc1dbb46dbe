"""The one builder of DeepSpeed's configuration. Takes our settings, gives the dictionary; imports nothing of DeepSpeed."""

from __future__ import annotations

from typing import Any

from r1ray.train.config import TrainConfig

__all__ = ["deepspeed_config"]


def deepspeed_config(config: TrainConfig, *, accumulation: int, bf16: bool) -> dict[str, Any]:
    """ZeRO at the wanted stage with the client's own AdamW, which needs no compiler on the workers.

    reduce_scatter is off on CPUs: gloo's all-reduce is faster (0.57 against 0.89 s per step at 25 M parameters, 2 ranks).
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_scatter": config.use_gpu}
    if config.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
