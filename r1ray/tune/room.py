"""How many trials of a sweep run side by side: as many as find room with all that they reserve. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r1ray import cluster
from r1ray.errors import ClusterTooSmall

__all__ = ["num_side_by_side"]


def num_side_by_side(
    found: cluster.Cluster, one: Sequence[Mapping[str, float]], *, most: int, wanted_by: str, wanted_by_one: str, remedy: str = ""
) -> int:
    """At most `most`, each with the bundles of `one` at once: with one more, some could hold what others wait for.

    Raises:
        ClusterTooSmall: not even one.
    """
    cluster.check_placement(found, one, wanted_by=wanted_by_one, remedy=remedy)
    fitting = 1
    for num in range(2, most + 1):
        try:
            cluster.check_placement(found, [*one] * num, wanted_by=wanted_by)
        except ClusterTooSmall:
            break
        fitting = num
    return fitting
