"""The two shapes in which OpenAI's API shows log-probabilities."""

from __future__ import annotations

import json
import math

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from r1ray.serve.logprobs import chat_logprobs, completion_logprobs
from r1ray.serve.protocol import TokenScore

HALF = "你".encode()[:2]


def test_a_chats_entries_are_openais_and_keep_every_byte() -> None:
    scores = [
        TokenScore(piece=" 好".encode(), logprob=-0.25, top=((" 好".encode(), -0.25), (HALF, -1.5), (630, -9.0))),
        TokenScore(piece=HALF, logprob=-math.inf),
    ]
    shown = chat_logprobs(scores)
    assert ChoiceLogprobs.model_validate(json.loads(json.dumps(shown, allow_nan=False)), strict=True).model_dump() == shown
    good, never = shown["content"]
    assert (good["token"], good["logprob"], bytes(good["bytes"]).decode()) == (" 好", -0.25, " 好")
    assert [(each["token"], each["bytes"]) for each in good["top_logprobs"]] == [
        (" 好", list(" 好".encode())),
        ("\\xe4\\xbd", [0xE4, 0xBD]),
        ("token_id:630", None),
    ]
    assert (never["logprob"], never["top_logprobs"]) == (-9999.0, [])


def test_a_completions_lists_are_openais_and_hold_the_token_beside_the_likeliest() -> None:
    scores = [
        TokenScore(piece=b"a", logprob=None),
        TokenScore(piece=b"z", logprob=-5.0, top=((b"b", -0.5), (HALF, -math.inf)), offset=1),
    ]
    shown = completion_logprobs(scores)
    assert json.loads(json.dumps(shown, allow_nan=False)) == {
        "tokens": ["a", "z"],
        "token_logprobs": [None, -5.0],
        "top_logprobs": [None, {"z": -5.0, "b": -0.5, "bytes:\\xe4\\xbd": -9999.0}],
        "text_offset": [0, 1],
    }
    assert Logprobs.model_validate(completion_logprobs(scores[1:]), strict=True)
