"""Serve's controller is asked once, however many models want to know."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from r1ray.serve.overview import Overview, Seen


class Controller:
    """Answers when it is let, and counts the questions."""

    def __init__(self) -> None:
        self.num_asked, self.num_running, self.may_answer, self.error = 0, 1, threading.Event(), None
        self.may_answer.set()

    def __call__(self):
        self.num_asked += 1
        self.may_answer.wait(5)
        if self.error is not None:
            raise self.error
        one = SimpleNamespace(replica_states={"RUNNING": self.num_running}, status="HEALTHY")
        none = SimpleNamespace(replica_states={}, status="UPDATING")
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"a": one, "b": none})})


def test_those_who_ask_together_share_one_answer_and_later_ones_get_a_new_one() -> None:
    async def run():
        controller = Controller()
        overview = Overview(controller)
        together = await asyncio.gather(*(overview.of("app", name) for name in ("a", "b", "a")))
        controller.num_running = 0
        return together, controller.num_asked, await overview.of("app", "a"), controller.num_asked

    together, num_first, later, num_later = asyncio.run(run())
    assert together == [Seen(1, True), Seen(0, False), Seen(1, True)]
    assert (num_first, later, num_later) == (1, Seen(0, True), 2)


def test_an_answer_may_be_a_second_old_where_that_will_do() -> None:
    async def run():
        controller = Controller()
        overview = Overview(controller)
        for _ in range(3):
            await overview.of("app", "a", max_age_s=60)
        return controller.num_asked

    assert asyncio.run(run()) == 1


def test_an_error_is_told_to_all_who_wait_and_the_next_asks_again() -> None:
    async def run():
        controller = Controller()
        controller.error = ConnectionError("no controller")
        overview = Overview(controller)
        found = await asyncio.gather(*(overview.of("app", "a", max_age_s=60) for _ in range(2)), return_exceptions=True)
        controller.error = None
        return found, await overview.of("app", "a", max_age_s=60), controller.num_asked

    found, after, num_asked = asyncio.run(run())
    assert [str(error) for error in found] == ["no controller"] * 2
    assert (after, num_asked) == (Seen(1, True), 2)


def test_one_who_leaves_takes_nobodys_answer_away() -> None:
    async def run():
        controller = Controller()
        controller.may_answer.clear()
        overview = Overview(controller)
        leaving, staying = (asyncio.create_task(overview.of("app", "a")) for _ in range(2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        controller.may_answer.set()
        return await staying, controller.num_asked

    assert asyncio.run(run()) == (Seen(1, True), 1)
