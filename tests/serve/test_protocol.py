"""What travels between router and replica, as pickle writes it down."""

from __future__ import annotations

import pickle

from r1ray.serve.protocol import Delta, TextRequest, TokenScore


def test_log_probabilities_travel_only_where_they_were_asked_for() -> None:
    plain = pickle.dumps(Delta(content="你好", num_tokens=2))
    assert b"TokenScore" not in plain and len(plain) < 130
    scores = tuple(TokenScore(piece=b"abc", logprob=-0.5, top=((b"abc", -0.5), (b"d", -1.5)), offset=3 * at) for at in range(20))
    assert (len(pickle.dumps(Delta(content="你好", scores=scores))) - len(plain)) / 20 < 70
    assert pickle.loads(pickle.dumps(Delta(scores=scores))).scores == scores
    asked = TextRequest(id="r", prompt="x")
    assert len(pickle.dumps(TextRequest(id="r", prompt="x", num_logprobs=5, echo=True))) - len(pickle.dumps(asked)) < 4
