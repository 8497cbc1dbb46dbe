"""Five pairs of ids, their feed for any split, and a nudge: what the tests of pair losses share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from r1ray.train.batches import BatchPlan
from r1ray.train.pair_feed import PairFeed
from r1ray.train.pairs import PairRow

ROWS = [
    PairRow((5, 9, 11), (40, 41, 42), (43, 44)),
    PairRow((7, 8), (30,), (31, 32, 33, 34)),
    PairRow((3, 4, 5, 6), (7, 8, 50), (51, 52, 53)),
    PairRow((90, 91), (92, 93), (94,)),
    PairRow((60,), (61, 62, 63, 64), (65, 66)),
]


def feed(*, rank=0, num_workers=1, accumulation=1, reference=None, batch_size=len(ROWS)) -> PairFeed:
    plan = BatchPlan([row.length for row in ROWS], batch_size=batch_size, num_epochs=1, seed=0, group_window=1)
    shape = {"num_steps": plan.num_steps, "rank": rank, "num_workers": num_workers, "accumulation": accumulation}
    return PairFeed(rows=ROWS, plan=plan, pad_id=0, reference=reference or {}, **shape)


def nudge(net) -> None:
    """As a step would: away from the reference, the same way each time."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def pairs() -> SimpleNamespace:
    return SimpleNamespace(rows=ROWS, feed=feed, nudge=nudge)
