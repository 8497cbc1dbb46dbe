"""The drawn tokens follow the distribution that each setting defines."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from r1ray.engine import sampler
from r1ray.engine.protocol import GenerationRequest
from r1ray.engine.sampler import Drawn, NoToken, Penalties
from r1ray.engine.scheduler import Stream
from r1ray.types import Sampling


def stream(seed=0, prompt=(1,), generated=(), stop=(), min_tokens=0, **settings):
    settings = {"temperature": 1.0, "top_p": 1.0, **settings}
    request = GenerationRequest(id="a", prompt_ids=prompt, sampling=Sampling(**settings), min_tokens=min_tokens)
    return Stream(request=request, mailbox=None, max_tokens=9, stop_ids=frozenset(stop), generated=list(generated), rng=random.Random(seed))


def with_request(one, **fields):
    one.request = replace(one.request, **fields)
    return one


def sample(logits, streams):
    return [drawn.token if isinstance(drawn, Drawn) else drawn for drawn in sampler.sample(logits, streams)]


def support(probabilities, **settings):
    """Tokens that are ever drawn in 400 draws of a whole batch."""
    logits = torch.tensor(probabilities).log().repeat(400, 1)
    return set(sample(logits, [stream(seed=i, **settings) for i in range(400)]))


def test_zero_temperature_takes_the_likeliest():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [stream(temperature=0)]) == [1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"min_p": 0.6}, {0, 1}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),  # of what top_k leaves: 0.4 / 0.9 = 0.44 < 0.5
        ({"top_k": 1}, {0}),
        ({"temperature": 0.01, "top_p": 0.9}, {0}),
    ],
)
def test_each_filter_keeps_its_tokens(settings, expected):
    assert support([0.4, 0.3, 0.2, 0.1], **settings) == expected


def test_frequencies_follow_the_probabilities():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = torch.tensor(probabilities).log().repeat(4000, 1)
    for settings in ({}, {"top_k": 4, "top_p": 0.9999}):
        counts = Counter(sample(logits.clone(), [stream(seed=i, **settings) for i in range(4000)]))
        assert [counts[t] / 4000 for t in range(4)] == pytest.approx(probabilities, abs=0.03)


def test_a_nucleus_larger_than_the_candidates_is_drawn_whole():
    logits = torch.zeros(300, 1000)
    drawn = sample(logits, [stream(seed=i, top_p=0.99) for i in range(300)])
    assert max(drawn) > 300
    assert sum(t > 500 for t in drawn) > 100


def test_penalties_follow_openais_formula():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    one = stream(prompt=(2,), generated=(1, 1), frequency_penalty=0.5, presence_penalty=0.25)
    Penalties(one, 4, logits.device).apply(logits, one.request.sampling)
    assert logits.tolist() == pytest.approx([1.0, 2.0 - 2 * 0.5 - 0.25, -1.0, 0.5])


def test_the_repetition_penalty_counts_the_prompt_too():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    one = stream(prompt=(2,), generated=(1,), repetition_penalty=2.0)
    Penalties(one, 4, logits.device).apply(logits, one.request.sampling)
    assert logits.tolist() == pytest.approx([1.0, 1.0, -2.0, 0.5])


def test_a_penalty_applies_to_greedy_answers():
    one = stream(temperature=0, generated=(1,), presence_penalty=2.0)
    assert sample(torch.tensor([[1.5, 3.0, 0.0]]), [one]) == [0]
    assert sample(torch.tensor([[1.5, 3.0, 0.0]]), [one]) == [1], "token 0 occurred now as well"


def test_no_end_before_the_minimum_length():
    assert sample(torch.tensor([[0.0, 9.0]]), [stream(temperature=0, stop=(1,), min_tokens=1)]) == [0]
    assert sample(torch.tensor([[0.0, 9.0]]), [stream(temperature=0, stop=(1,), min_tokens=1, generated=(0,))]) == [1]


def test_rows_do_not_influence_each_other():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 2
    settings = [{}, {"top_p": 0.5}, {"top_k": 40}, {"temperature": 0}, {"min_p": 0.1}, {"presence_penalty": 1.0}]
    together = sample(logits.clone(), [stream(seed=7, generated=(3,), **s) for s in settings])
    alone = [sample(logits[i : i + 1].clone(), [stream(seed=7, generated=(3,), **s)])[0] for i, s in enumerate(settings)]
    assert together == alone


def test_broken_rows_give_nothing_and_harm_nobody():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 9.0], [float("-inf"), float("-inf")]])
    assert sample(logits, [stream(), stream(temperature=0), stream()]) == [NoToken.DAMAGED, 1, NoToken.DAMAGED]


def test_a_mask_or_a_bias_that_leaves_nothing_is_not_taken_for_damage():
    forbidding = {"mask": lambda drawn: []}, {"logit_bias": ((0, float("-inf")), (1, float("-inf")))}
    streams = [with_request(stream(temperature=0), **fields) for fields in forbidding]
    good, damaged = torch.tensor([[0.0, 9.0]] * 2), torch.tensor([[0.0, float("nan")]] * 2)
    assert sample(good, streams) == [NoToken.FORBIDDEN] * 2
    assert sample(damaged, streams) == [NoToken.DAMAGED] * 2
