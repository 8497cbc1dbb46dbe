"""One actor of the sampling sweep: holds the model, measures setting after setting. The Ray class is thin; `Bench` works without Ray."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from statistics import fmean
from typing import Any

from ray import tune

from r1ray.data.read import read_conversations
from r1ray.engine.create import create_engine
from r1ray.errors import TuningError
from r1ray.evaluate.config import EvaluateConfig
from r1ray.evaluate.runner import evaluate
from r1ray.registry import Registry
from r1ray.tune.config import SamplingSweepConfig
from r1ray.types import Artifact, Sampling

__all__ = ["Bench", "SamplingTrial"]

NOTHING = (0.0, 0.0)
"""What an example adds to a metric that its gold answer does not allow."""


class Bench:
    """The model, its engine and the evaluation set, loaded once; `measure` answers the set with one setting."""

    def __init__(self, config: SamplingSweepConfig, artifact: Artifact, registry: Registry) -> None:
        start = time.monotonic()
        self._config = config
        self._registry = registry
        self._artifact = artifact
        self._conversations = read_conversations(config.evaluation_data).conversations
        # Nothing may wait for a slot, or waiting would be measured as the setting's latency.
        threads = config.engine.num_threads or max(1, int(config.cpus_per_actor))
        engine = config.engine.model_copy(update={"max_waiting": 0, "num_threads": threads})
        self._engine = create_engine(self._artifact, engine, self._registry)
        self._evaluation = EvaluateConfig(data=config.data, length_margin=config.length_margin, num_bootstrap=0)
        self._num_measured = 0
        print(f"{artifact.ref} and {len(self._conversations)} dialogues ready in {time.monotonic() - start:.1f} s", flush=True)

    def measure(self, sampling: Sampling) -> dict[str, Any]:
        """quality (mean of the wanted metrics), latency_s (mean seconds per answer with all slots busy), every score, and
        `shares`: what each example adds to each of these metrics, as JSON (a text, which Tune's loggers leave alone).
        """
        seeded = sampling if sampling.seed is not None else sampling.model_copy(update={"seed": self._config.seed})
        # The prompts are those of the setting before: what that one computed of them would be this one's lower latency.
        self._num_measured += 1
        evaluation = self._evaluation.model_copy(update={"cache_salt": f"setting-{self._num_measured}"})
        report = evaluate(self._artifact, self._conversations, evaluation, registry=self._registry, sampling=seeded, engine=self._engine)
        scores = dict(report.metrics)
        wanted = [name for name in self._config.quality if name in scores]
        if not wanted:
            raise TuningError(f"The evaluation reports {', '.join(scores)}, none of quality={list(self._config.quality)}. Name one.")
        seconds = sorted(row["seconds"] for row in report.examples)
        scores["latency_p95_s"] = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        scores["ttft_s"] = fmean(row["ttft_s"] for row in report.examples)
        return {
            "quality": fmean(scores[name] for name in wanted),
            "latency_s": fmean(seconds),
            "scores": scores,
            "shares": json.dumps({name: [row["shares"].get(name, NOTHING) for row in report.examples] for name in wanted}),
            "data_hash": report.data_hash,
            "num_examples": report.num_examples,
        }

    def close(self) -> None:
        asyncio.run(self._engine.stop())


class SamplingTrial(tune.Trainable):
    """Ray Tune's view of a Bench: one step per setting; the actor and its model are kept for the next one."""

    def setup(self, config: dict[str, Any], sweep: SamplingSweepConfig, artifact: Artifact, registry: Registry) -> None:
        self._base = sweep.base
        self._bench = Bench(sweep, artifact, registry)
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        return {**self._bench.measure(self._sampling), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._sampling = Sampling.model_validate(self._base.model_dump() | new_config["values"])
        return True

    def cleanup(self) -> None:
        """The process ends after this. Ray's SIGTERM handler would raise in the middle of freeing the model: a traceback in the log."""
        self._bench.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
