"""The table of a comparison in a job's log: every figure whole, however many models there are."""

from __future__ import annotations

import pytest

from r1ray.evaluate.table import show
from r1ray.types import Report

METRICS = {"exact_match": 0.72, "exact_match_low": 0.63, "exact_match_high": 0.81, "perplexity": 2646.8, "mean_answer_tokens": 21.8}
METRICS |= {"perplexity_low": 1771.6, "perplexity_high": 3840.4, "tokens_per_second": 1323.3}


def reports(num: int) -> list[Report]:
    names = ["smollm2-135m-instruct@1", *(f"intents-student-{number}@1" for number in range(1, num))]
    return [Report(model=name, dataset="dev.csv", data_hash="d", num_examples=100, metrics=METRICS) for name in names]


@pytest.mark.parametrize(("num", "num_tables"), [(1, 1), (2, 1), (3, 1), (7, 3)])
def test_more_models_than_fit_go_below(num, num_tables, capsys) -> None:
    show(reports(num))
    printed = capsys.readouterr().out
    assert printed.count("100 examples of dev.csv") == printed.count("smollm2-135m-instruct@1") == num_tables
    assert all(printed.count(f"intents-student-{number}@1 ") == 1 for number in range(1, num))
    assert "…" not in printed
    assert printed.count("0.720 (0.630-0.810)") == num - 1 + num_tables, "each figure is on one line with its interval"
    assert max(map(len, printed.splitlines())) <= 120


def test_a_terminal_that_is_too_narrow_loses_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr("r1ray.evaluate.table._LOG_WIDTH", 50)
    show(reports(2))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "(1771.6" in printed
