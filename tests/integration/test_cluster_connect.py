"""Joining a real cluster: what `connect` sees is what Ray has, and its arithmetic agrees with Ray's scheduler."""

from __future__ import annotations

import pytest

from r1ray import cluster
from r1ray.errors import ClusterTooSmall

pytestmark = pytest.mark.ray


def test_connect_joins_the_cluster_and_describes_it(ray_cluster):
    found = cluster.connect(ray_cluster.settings)
    assert found.address == ray_cluster.address
    assert found.dashboard_url == ray_cluster.dashboard_url
    assert found.total("CPU") == 4
    assert cluster.num_placeable(found, {"CPU": 1}) == 4


@pytest.mark.parametrize(
    ("bundles", "strategy", "fits"), [([{"CPU": 2}] * 2, "STRICT_PACK", True), ([{"CPU": 1}] * 2, "STRICT_SPREAD", False)]
)
def test_the_check_says_what_ray_would_do(ray_cluster, bundles, strategy, fits):
    from ray.util.placement_group import placement_group, remove_placement_group

    found = cluster.connect(ray_cluster.settings)
    group = placement_group(bundles, strategy=strategy)
    try:
        assert group.wait(timeout_seconds=20 if fits else 2) is fits
    finally:
        remove_placement_group(group)
    if fits:
        cluster.check_placement(found, bundles, strategy=strategy, wanted_by="a test")
    else:
        with pytest.raises(ClusterTooSmall, match="on different nodes"):
            cluster.check_placement(found, bundles, strategy=strategy, wanted_by="a test")


def test_the_doctor_says_what_fits(ray_cluster):
    from r1ray.cli.doctor import _running_here, cluster_findings

    assert ray_cluster.address in _running_here()
    lines = {finding.subject: finding.text for finding in cluster_findings(cluster.connect(ray_cluster.settings))}
    assert ray_cluster.address in lines["cluster"]
    assert lines["what fits"].startswith("4 training workers with 1 CPU or 0 with 1 CPU and 1 GPU, or 8 CPU model replicas")
