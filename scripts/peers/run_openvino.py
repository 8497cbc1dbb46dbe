# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["openvino-genai==2026.4.1", "numpy"]
# ///
"""OpenVINO GenAI's continuous batching on int8 weights: `run_openvino.py EXPORTED_MODEL REPEATS`."""

from __future__ import annotations

import sys

import numpy
import openvino
import openvino_genai as genai
from workload import measure


def main(model: str, repeats: int) -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_seqs = 32
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU")

    def generate(prompts: list[list[int]], num_new: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=num_new, min_new_tokens=num_new, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        assert all(len(result.m_generation_ids[0]) == num_new for result in results)

    measure("openvino-genai 2026.4.1", "int8 weights", generate, repeats)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
