"""The ranks of a split model as Ray actors: in the replica's placement group where there is one, watched by Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from r1ray.engine.hardware import physical_cores
from r1ray.engine.link import Place
from r1ray.engine.pipeline import Host, Worker
from r1ray.engine.stage import StageOrder
from r1ray.errors import EngineStopped

__all__ = ["StageActors"]

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0  # of hundreds of gigabytes, from a shared file system; a rank that dies is noticed at once


class StageActor:
    """Runs in a Ray actor."""

    def __init__(self, order: StageOrder) -> None:
        self._worker = Worker(order)
        self._rank = order.place.rank

    def host(self) -> Host:
        """Answers when the layers are loaded."""
        return _host()

    def compute(self, address: str, port: int, hidden: int) -> None:
        """Never returns, so that the call ends when this process does, whatever ended it."""
        try:
            self._worker.compute(address, port, hidden)
        except EngineStopped as error:
            log.warning("%s", error)
        except Exception:
            log.exception("rank %d of the pipeline died", self._rank)
        os._exit(0)  # the others see the connection close at once; Ray sees the actor gone


class StageActors:
    """Each actor reserves `resources`.

    Inside a placement group (a Serve replica's) the ranks of a stage share a bundle, so they lie in one node; this process has bundle 0.
    A trial of a sweep holds all of its bundle: there the other ranks of its stage have one of their own, the second.
    """

    def __init__(self, resources: Mapping[str, float]) -> None:
        self._resources = resources
        self.actors: list[Any] = []
        self._computing: list[Any] = []

    def start(self, orders: Sequence[StageOrder]) -> None:
        import ray

        group = ray.util.get_current_placement_group()
        for order in orders:
            options = dict(self._resources) | _placement(group, order.place)
            self.actors.append(ray.remote(StageActor).options(**options).remote(order))

    def wait(self) -> list[Host]:
        import ray
        from ray.exceptions import RayError

        try:
            return [_host(), *ray.get([actor.host.remote() for actor in self.actors], timeout=LOAD_TIMEOUT_S)]
        except RayError as error:
            raise EngineStopped(f"A stage of the pipeline could not load its layers: {error}.") from error

    def compute(self, address: str, port: int, hidden: int) -> None:
        self._computing = [actor.compute.remote(address, port, hidden) for actor in self.actors]

    def wait_for_end(self) -> None:
        import ray
        from ray.exceptions import RayError

        ended, _ = ray.wait(self._computing, num_returns=1)
        try:
            ray.get(ended)
        except RayError as error:
            log.info("a rank of the pipeline ended: %s", error)

    def kill(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def _host() -> Host:
    import ray

    node = str(ray.get_runtime_context().get_node_id())
    return Host(node=node, address=str(ray.util.get_node_ip_address()), num_cores=physical_cores())


def _placement(group: Any, place: Place) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if group is None or (place.num_stages > 1 and group.bundle_count == 1):
        return {}
    own = int(place.num_tensor > 1 and group.bundle_count > place.num_stages)
    bundle = own + 1 + (place.bundle - 1) % (group.bundle_count - own - 1) if place.bundle else own
    return {
        "num_cpus": 0,  # the bundle is the replica's already; the ranks of its next version must fit beside these
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle),
    }
