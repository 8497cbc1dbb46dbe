"""Two workers without Ray: `train(model, "train.zero_stage=1", ...)` gives the run's directory, with curve and checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train import shards
from r1ray.train.config import FinetuneConfig
from r1ray.train.order import WorkOrder
from r1ray.train.parts import parted
from r1ray.train.tokens import TokenSet, described
from r1ray.types import Artifact

STEPS = 4
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Rows of many lengths that count upwards; the last batch is smaller than the others, so that one worker has an empty pass."""
    rng = random.Random(0)
    lengths = [rng.randint(9, 40) for _ in range(4 * STEPS - 3)]
    ids = [[10 + (start + place) % 20 for place in range(length)] for length in lengths for start in [rng.randrange(20)]]
    masks = [[int(place >= length // 2) for place in range(length)] for length in lengths]
    place = tmp_path_factory.mktemp("tokens") / "set"
    with shards.replacing(place) as unfinished, shards.ShardWriter(unfinished, is_mixed=False) as writer:
        rows = pa.table({"input_ids": ids, "mask": masks}, schema=shards.TOKENS)
        writer.append(rows.append_column(shards.ORIGIN, pa.array(range(len(ids)), shards.ORIGIN.type)))
        writer.close({"shortened": 0, "rejected": 0}, {})
    return described(place)


@pytest.fixture(scope="session")
def bases(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_qwen2: Path, wide_qwen2: Path, tiny_deepseek_v3: Path
) -> dict[str, Artifact]:
    registry = Registry(Settings(home=tmp_path_factory.mktemp("home")))
    return {
        "llama": import_model(str(tiny_llama), name="tiny-llama", registry=registry),
        "qwen2": import_model(str(tiny_qwen2), name="tiny-qwen2", registry=registry),
        "wide": import_model(str(wide_qwen2), name="wide-qwen2", registry=registry),
        "deepseek_v3": import_model(str(tiny_deepseek_v3), name="tiny-r1", registry=registry),
    }


@pytest.fixture(scope="session")
def ranks() -> Iterator[subprocess.Popen[str]]:
    """The process that forks workers; imports take it seconds, once."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("ranks.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def train(ranks: subprocess.Popen[str], bases: dict[str, Artifact], tokens: TokenSet, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a base for a few float32 steps; the same settings give the same directory."""
    known: dict[tuple[object, ...], Path] = {}

    def run(base: str, *overrides: str, world: int = 2, directory: Path | None = None, num_steps: int = STEPS) -> Path:
        key = (base, overrides, world, num_steps)
        if directory is None and key in known:
            return known[key]
        place = directory or tmp_path_factory.mktemp("run")
        order = place.parent / f"{place.name}.{len(list(place.parent.glob(place.name + '.*')))}.order"
        order.write_bytes(pickle.dumps(_order(bases[base], tokens, place, num_steps, world, overrides)))
        assert ranks.stdin is not None and ranks.stdout is not None
        ranks.stdin.write(json.dumps({"order": str(order), "world": world}) + "\n")
        ranks.stdin.flush()
        for line in ranks.stdout:
            if line.startswith(("DONE", "FAILED")):
                assert line.startswith("DONE"), f"{base} {overrides}: {line}"
                break
        else:
            raise AssertionError("the workers' parent died")
        known[key] = place
        return place

    return run


def _order(base: Artifact, tokens: TokenSet, place: Path, num_steps: int, world: int, overrides: tuple[str, ...]) -> WorkOrder:
    settings = {"num_workers": world, "batch_size": 4, "micro_batch_size": 1, "dtype": "float32", "method": "full", "learning_rate": 5e-3}
    keys = [f"train.{key}={value}" for key, value in settings.items()]
    config = load_config(FinetuneConfig, None, ["data.path=none", *keys, *overrides]).train
    attention = "sdpa" if config.parallelism.sequence > 1 else "eager"
    material, held_out = parted(tokens, config.eval_share, config.seed) if config.eval_share else (tokens, None)
    return WorkOrder(
        config=config,
        base=base,
        material=material,
        held_out=held_out,
        run=place.name,
        run_directory=place,
        num_steps=num_steps,
        dtype=config.dtype,
        attention=attention,
        settings=Settings(home=place.parent),
    )
