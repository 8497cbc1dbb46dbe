from __future__ import annotations

import threading

from r1ray.train.progress import FILE, Curve, Follower, Step, curve, line


def step(number: int, loss: float = 1.0) -> Step:
    time = {"seconds": 0.5, "elapsed_s": number / 2, "remaining_s": 65.0}
    return Step(step=number, total_steps=10, loss=loss, learning_rate=2e-3, grad_norm=0.1, tokens=100, **time)


def test_a_repeated_step_counts_once_and_an_unfinished_line_not_at_all(tmp_path) -> None:
    writer = Curve(tmp_path)
    for number, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 2.0), (3, 1.5), (4, 1.0)):
        writer.write(step(number, loss))
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert [(one.step, one.loss) for one in curve(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]


def test_the_follower_passes_on_every_step_written_after_it_began(tmp_path) -> None:
    writer = Curve(tmp_path)
    writer.write(step(1))
    seen: list[int] = []
    arrived = threading.Event()

    def on_steps(steps: list[Step]) -> None:
        seen.extend(one.step for one in steps)
        arrived.set()

    with Follower(tmp_path, on_steps, every=3, poll_s=0.01):
        for number in (2, 3):
            writer.write(step(number))
        assert arrived.wait(5)
        writer.write(step(4))
    assert seen == [2, 3, 4]


def test_the_progress_line_says_what_one_wants_to_know() -> None:
    assert line([step(4, 2.0), step(5, 1.0)]) == "step 5/10  loss 1.5000  lr 2.0e-03  200 tokens/s  1:05 left"
