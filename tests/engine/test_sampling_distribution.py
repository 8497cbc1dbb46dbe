"""Drawn tokens are distributed as transformers' own processors and warpers say: chi-square over many draws with fixed seeds.

A setting passes when no token that transformers excludes is ever drawn and the goodness of fit has a p-value above 1 in 1000.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from r1ray.engine.protocol import GenerationRequest
from r1ray.engine.sampler import sample
from r1ray.engine.scheduler import Stream
from r1ray.types import Sampling
from tests.engine import conftest as kit

NUM_DRAWS = 3000
LEAST_P_VALUE = 1e-3
LEAST_EXPECTED = 5  # draws of a token below which the chi-square approximation is poor: such tokens are pooled
PROMPT, GENERATED = (3, 8, 11), (5, 8)

SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"min_p": 0.15},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 30, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


def sampling(**settings) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, **settings})


def expected(logits_V: Tensor, wanted: Sampling, seen: Sequence[int]) -> Tensor:
    """transformers' processors in the order in which its `generate` applies them."""
    chain = LogitsProcessorList()
    if wanted.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
    chain.append(TemperatureLogitsWarper(wanted.temperature))
    if wanted.top_k:
        chain.append(TopKLogitsWarper(wanted.top_k))
    chain.append(TopPLogitsWarper(wanted.top_p))
    if wanted.min_p:
        chain.append(MinPLogitsWarper(wanted.min_p))
    return chain(torch.tensor([list(seen)]), logits_V[None].clone())[0].double().softmax(-1)


def drawn(logits_V: Tensor, wanted: Sampling, num: int) -> Counter[int]:
    """First tokens of `num` streams that share a step, each with its own seed."""
    request = GenerationRequest(id="a", prompt_ids=PROMPT, sampling=wanted)
    streams = [
        Stream(request=request, mailbox=None, max_tokens=9, stop_ids=frozenset(), generated=list(GENERATED), rng=random.Random(seed))
        for seed in range(num)
    ]
    return Counter(found.token for found in sample(logits_V.repeat(num, 1), streams))


def p_value(counts: Counter[int], probabilities_V: Tensor) -> float:
    """Of counts as far from `probabilities_V` as these; 0 when a token of probability zero was drawn."""
    if any(probabilities_V[token] == 0 for token in counts):
        return 0.0
    num = counts.total()
    often = (probabilities_V * num >= LEAST_EXPECTED).nonzero()[:, 0].tolist()
    wanted = [float(probabilities_V[token]) * num for token in often]
    seen = [counts[token] for token in often]
    if (rest := num - sum(wanted)) > LEAST_EXPECTED:
        wanted, seen = [*wanted, rest], [*seen, num - sum(seen)]
    if len(wanted) == 1:
        return 1.0
    return float(chisquare(seen, [each * sum(seen) / sum(wanted) for each in wanted]).pvalue)


@pytest.mark.parametrize("vocab_size", [40, 700], ids=["sorted whole", "among the candidates"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()) or "plain")
def test_draws_follow_transformers_distribution(settings, vocab_size):
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    wanted = sampling(**settings)
    counts = drawn(logits_V, wanted, NUM_DRAWS)
    assert p_value(counts, expected(logits_V, wanted, (*PROMPT, *GENERATED))) > LEAST_P_VALUE


@pytest.mark.parametrize(
    ("real", "claimed"),
    [
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"top_p": 0.9}, {"top_p": 0.85}),
        ({"top_k": 12}, {"top_k": 13}),
        ({"repetition_penalty": 1.2}, {}),
    ],
)
def test_the_chi_square_notices_a_wrong_distribution(real, claimed):
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(40)) * 2
    counts = drawn(logits_V, sampling(**real), NUM_DRAWS)
    assert p_value(counts, expected(logits_V, sampling(**claimed), (*PROMPT, *GENERATED))) < LEAST_P_VALUE


def test_the_engine_draws_from_transformers_distribution_of_the_models_logits(tiny_llama):
    """The whole way: a model's logits, a full batch, a prompt that all streams share."""
    prompt = tuple(range(20, 60))
    wanted = sampling(temperature=1.4, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    model = kit.lively(tiny_llama)
    with torch.inference_mode():
        logits_V = model(torch.tensor([prompt])).logits[0, -1]

    async def scenario():
        async with kit.running(kit.lively(tiny_llama), num_slots=64, max_waiting=2000) as engine:
            requests = (
                kit.wanted(str(seed), prompt, max_tokens=1, sampling={**wanted.model_dump(), "max_tokens": 1, "seed": seed})
                for seed in range(2000)
            )
            return await asyncio.gather(*(kit.tokens(engine, request) for request in requests))

    counts = Counter(token for (token,) in asyncio.run(scenario()))
    assert len(counts) > 3
    assert p_value(counts, expected(logits_V, wanted, prompt)) > LEAST_P_VALUE
