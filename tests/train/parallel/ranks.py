"""Ranks of a training without Ray: reads a case per line, forks its workers, says what came of it.

    echo '{"order": "order.pickle", "world": 2}' | python ranks.py

The libraries are imported once and the workers forked from there, so a case takes a second or two instead of ten. Run by
test_equal_losses.py; each worker runs what Ray Train's workers run, with a reporter that only publishes.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from r1ray.train.worker import Attempt, _quieten  # noqa: E402

for name in (
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.runtime.sequence_parallel.ulysses_sp",
    "peft",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.trainer.sft_trainer",
    "r1ray.train.objective.sft_trainer",
):
    import_module(name)


class PublishingReporter:
    """Puts checkpoints where they belong and tells nobody."""

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def is_leaving(self) -> bool:
        return False

    def save(self, metrics: dict[str, float], source: Path, destination: Path, publish: Callable[[Path], None]) -> None:
        publish(source)
        dist.barrier()


def main() -> None:
    print("READY", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        children = [_fork(case, rank) for rank in range(case["world"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print("DONE" if not any(codes) else f"FAILED {codes}", flush=True)


def _fork(case: dict, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(case, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def work(case: dict, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["world"]), DS_ACCELERATOR="cpu")
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # named, not used: the group comes from a file
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{case['order']}.store", rank=rank, world_size=case["world"])
    _quieten()
    order = pickle.loads(Path(case["order"]).read_bytes())
    Attempt(order, rank=rank, world=case["world"], reporter=PublishingReporter()).run()
    dist.barrier()


if __name__ == "__main__":
    main()
