"""The learning curve as people see it."""

from __future__ import annotations

from r1ray.train.plot import draw, sparkline
from r1ray.train.progress import Step


def test_a_falling_loss_is_a_falling_line():
    assert sparkline([3.0, 2.0, 1.0, 0.0]) == "█▆▃▁  3.000 -> 0.000"
    assert len(sparkline([float(n) for n in range(1000)], width=40).split()[0]) == 40


def test_a_flat_and_an_empty_curve_are_no_error():
    assert sparkline([1.0, 1.0]) == "▁▁  1.000 -> 1.000"
    assert sparkline([]) == ""


def test_the_picture_is_a_png(tmp_path):
    shared = {
        "total_steps": 3,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100,
        "seconds": 1.0,
        "elapsed_s": 1.0,
        "remaining_s": 0.0,
    }
    steps = [Step(step=n, loss=3.0 / n, **shared) for n in (1, 2, 3)]
    assert draw(steps, tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
