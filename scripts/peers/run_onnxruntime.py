# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy"]
# ///
"""onnxruntime-genai's generator on int8 weights, all prompts in one static batch: `run_onnxruntime.py EXPORTED_MODEL REPEATS`.

Its engine, which batches continuously, wants paged attention, which exists for GPUs only.
"""

from __future__ import annotations

import sys

import numpy
import onnxruntime_genai as genai
from workload import NUM_PROMPT, measure


def main(folder: str, repeats: int) -> None:
    model = genai.Model(folder)

    def generate(prompts: list[list[int]], num_new: int) -> None:
        length = NUM_PROMPT + num_new
        params = genai.GeneratorParams(model)
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(numpy.array(prompts, dtype=numpy.int32))
        for _ in range(num_new):
            generator.generate_next_token()
        assert all(len(generator.get_sequence(number)) == length for number in range(len(prompts)))

    measure("onnxruntime-genai 0.18.0", "int8 weights", generate, repeats)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
