"""One rank of the same training without Ray and without TRL: torch DDP, or DeepSpeed's own loop. Run by scripts/bench train.

The batches and the loss are r1ray's (a pickled WorkOrder), the model too: so that only the machinery around a step differs. `ddp` has
PEFT's LoRA layers as they come, `ddp-fused` and `deepspeed` compute them as r1ray does. DDP keeps its weights and AdamW's states in the
training dtype, DeepSpeed has float32 masters besides, as r1ray's own runs do.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1ray.environment import disable_deepspeed_shm
from r1ray.train.batches import accumulation_steps
from r1ray.train.build import trained_model
from r1ray.train.feed import Feed
from r1ray.train.fused import fuse_adapters
from r1ray.train.loss import add_supervised_loss
from r1ray.train.order import WorkOrder, plan_for
from r1ray.train.zero import deepspeed_config


class Ddp:
    """torch's DistributedDataParallel and fused AdamW."""

    def __init__(self, model: Any, order: WorkOrder, _accumulation: int) -> None:
        self.model = torch.nn.parallel.DistributedDataParallel(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=order.config.learning_rate, fused=True)
        self.max_norm = order.config.max_grad_norm

    def step(self, passes: list[dict[str, torch.Tensor]], scale: float) -> None:
        for number, inputs in enumerate(passes):
            last = number == len(passes) - 1
            with self.model.no_sync() if not last else torch.enable_grad():
                (self.model(**inputs, supervised=True) * scale).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeed:
    """deepspeed.initialize with the very configuration of r1ray's runs."""

    def __init__(self, model: Any, order: WorkOrder, accumulation: int) -> None:
        import deepspeed

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=order.config.learning_rate, fused=True)
        config = deepspeed_config(order.config, accumulation=accumulation, bf16=order.dtype == "bfloat16")
        config["checkpoint"] = {}
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.accumulation = accumulation

    def step(self, passes: list[dict[str, torch.Tensor]], scale: float) -> None:
        for inputs in passes:
            self.engine.backward(self.engine(**inputs, supervised=True) * scale * self.accumulation)
            self.engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=("ddp", "ddp-fused", "deepspeed"))
    parser.add_argument("order", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    disable_deepspeed_shm()
    dist.init_process_group("gloo")
    order: WorkOrder = pickle.loads(arguments.order.read_bytes())
    if arguments.framework == "ddp":  # padded rows and the quicker of transformers' two ways to attend on a CPU
        order = replace(order, attention="eager", config=order.config.model_copy(update={"packing": False}))
    config = order.config
    accumulation = accumulation_steps(config.batch_size, world, config.micro_batch_size)
    ids, masks = order.material.rows()
    feed = Feed(
        input_ids=ids, masks=masks, plan=plan_for(config, order.material), num_steps=order.num_steps, rank=rank, num_workers=world,
        accumulation=accumulation, pad_id=0, packing=bool(config.packing), attention=order.attention,
    )  # fmt: skip
    model = trained_model(order)
    if arguments.framework != "ddp":
        fuse_adapters(model)
    add_supervised_loss(model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
    runner = (DeepSpeed if arguments.framework == "deepspeed" else Ddp)(model, order, accumulation)
    seconds = []
    for step in range(order.num_steps):
        dist.barrier()
        start = time.perf_counter()
        passes = [feed[step * accumulation + number] for number in range(accumulation)]
        runner.step(passes, world / feed.num_trained(step))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        arguments.out.write_text(
            json.dumps({"seconds": seconds, "tokens": [feed.num_tokens(s) for s in range(order.num_steps)], "peak": peak})
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
