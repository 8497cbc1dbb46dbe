"""Placement arithmetic and ports; joining a real cluster is in tests/integration."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray import cluster
from r1ray.cluster import Cluster, Node, check_placement
from r1ray.errors import ClusterTooSmall, PortInUse


def made_of(*resources, **labels):
    nodes = tuple(Node(id=str(number), resources=each, labels=labels) for number, each in enumerate(resources))
    return Cluster(address="test", nodes=nodes)


def refusal(*arguments, **options):
    with pytest.raises(ClusterTooSmall) as caught:
        check_placement(*arguments, wanted_by="training", **options)
    return str(caught.value)


TWO_GPU_NODES = made_of({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2})


def test_too_many_workers_are_refused_with_what_fits_and_what_to_set():
    text = refusal(TWO_GPU_NODES, [{"CPU": 1, "GPU": 1}] * 8, remedy="Set train.num_workers={num}")
    assert text == (
        "training wants 8 x {CPU: 1, GPU: 1}; this cluster can ever hold 4 (2 nodes x 2). "
        "Set train.num_workers=4 or add nodes in cluster.yaml."
    )


def test_what_fits_passes():
    check_placement(TWO_GPU_NODES, [{"CPU": 1, "GPU": 1}] * 4, wanted_by="training")
    check_placement(TWO_GPU_NODES, [{"CPU": 0.5}] * 32, wanted_by="serving")
    check_placement(TWO_GPU_NODES, [], wanted_by="nothing")
    check_placement(TWO_GPU_NODES, [{"CPU": 0, "GPU": 0}], wanted_by="an actor that reserves nothing")


def test_a_bundle_that_no_node_holds_is_named():
    text = refusal(TWO_GPU_NODES, [{"CPU": 1}, {"CPU": 1, "GPU": 4}])
    assert "number 2, {CPU: 1, GPU: 4}, can never be placed (2 nodes; the largest has {CPU: 8, GPU: 2})" in text


def test_an_unknown_resource_is_missing_everywhere():
    assert "can ever hold 0 (2 nodes; the largest has {CPU: 8, serve: 0})" in refusal(TWO_GPU_NODES, [{"CPU": 1, "serve": 1}])


@pytest.mark.parametrize(
    ("strategy", "bundles", "fits"),
    [
        ("PACK", [{"CPU": 3}] * 4, True),
        ("SPREAD", [{"CPU": 3}] * 4, True),
        ("STRICT_PACK", [{"CPU": 3}] * 2, True),
        ("STRICT_PACK", [{"CPU": 3}] * 3, False),
        ("STRICT_SPREAD", [{"CPU": 3}] * 2, True),
        ("STRICT_SPREAD", [{"CPU": 1}] * 3, False),
    ],
)
def test_each_strategy_counts_as_ray_places(strategy, bundles, fits):
    if fits:
        check_placement(TWO_GPU_NODES, bundles, strategy=strategy, wanted_by="x")
    else:
        place = {"STRICT_PACK": "on one node", "STRICT_SPREAD": "on different nodes"}[strategy]
        assert place in refusal(TWO_GPU_NODES, bundles, strategy=strategy)


def test_labels_narrow_the_nodes():
    labelled = made_of({"CPU": 4}, **{"r1ray.io/role": "gpu"})
    check_placement(labelled, [{"CPU": 4}], labels={"r1ray.io/role": "gpu"}, wanted_by="x")
    assert "labelled {r1ray.io/role: cpu}" in refusal(labelled, [{"CPU": 1}], labels={"r1ray.io/role": "cpu"})


def test_a_dead_node_holds_nothing_and_a_planned_one_counts():
    dead = Node(id="a", resources={"CPU": 8}, alive=False)
    planned = Node(id="b", resources={"CPU": 2}, planned=True)
    mixed = Cluster(address="x", nodes=(dead, planned))
    assert mixed.total("CPU") == 2
    assert cluster.num_placeable(mixed, {"CPU": 1}) == 2
    check_placement(mixed, [{"CPU": 2}], wanted_by="x")


def test_the_autoscalers_remaining_nodes_are_planned():
    text = """
    head_node_type: head
    max_workers: 9
    available_node_types:
      head: {resources: {CPU: 0}, node_config: {}}
      gpu: {resources: {CPU: 4, GPU: 1}, labels: {a: b}, max_workers: 3, node_config: {}}
      detected: {resources: {}, node_config: {}}
    """
    running = (Node(id="1", resources={}, labels={"ray.io/node-group": "gpu"}),)
    planned = list(cluster._planned(running, cluster._launcher_groups(text)))
    assert [(node.resources, node.labels, node.planned) for node in planned] == [({"CPU": 4, "GPU": 1}, {"a": "b"}, True)] * 2


def test_mixed_bundles_that_greedy_placing_misses_are_found():
    nodes = made_of({"CPU": 10}, {"CPU": 9})
    check_placement(nodes, [{"CPU": size} for size in (5, 5, 3, 3, 3)], wanted_by="x")
    check_placement(nodes, [{"CPU": size} for size in (4, 3, 3, 3, 6)], wanted_by="x")


def test_an_answer_takes_less_than_a_second_however_hard_the_question():
    nodes = made_of(*[{"CPU": 10.0}] * 12)
    bundles = [{"CPU": size} for size in (3.1, 3.7, 4.3, 5.9, 2.3) * 6]
    start = time.process_time()  # without what else runs on the machine
    with contextlib.suppress(ClusterTooSmall):
        check_placement(nodes, bundles, wanted_by="x")
    assert time.process_time() - start < 1.0


SIZES = st.integers(min_value=0, max_value=4)
BUNDLE = st.fixed_dictionaries({"CPU": SIZES, "GPU": st.integers(min_value=0, max_value=2)})


@given(
    st.lists(BUNDLE, min_size=1, max_size=3),
    st.lists(BUNDLE, min_size=1, max_size=4),
    st.sampled_from(["PACK", "STRICT_PACK", "STRICT_SPREAD"]),
)
@settings(max_examples=200, deadline=None)
def test_the_check_agrees_with_trying_every_placement(nodes, bundles, strategy):
    def holds(choice):
        if strategy == "STRICT_PACK" and len(set(choice)) > 1:
            return False
        used = [node for node, bundle in zip(choice, bundles, strict=True) if any(bundle.values())]
        if strategy == "STRICT_SPREAD" and len(set(used)) < len(used):
            return False
        loads = [
            {name: sum(b[name] for at, b in zip(choice, bundles, strict=True) if at == n) for name in ("CPU", "GPU")}
            for n in range(len(nodes))
        ]
        return all(load[name] <= node[name] for load, node in zip(loads, nodes, strict=True) for name in load)

    possible = any(holds(choice) for choice in itertools.product(range(len(nodes)), repeat=len(bundles)))
    try:
        check_placement(made_of(*nodes), bundles, strategy=strategy, wanted_by="x")
        accepted = True
    except ClusterTooSmall as error:
        accepted = False
        assert isinstance(pickle.loads(pickle.dumps(error)), ClusterTooSmall)
    assert accepted == possible


def test_a_port_in_use_is_named_and_a_free_one_passes():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(PortInUse, match=f"Port {port} on 127.0.0.1"):
            cluster.check_port("127.0.0.1", port)
    cluster.check_port("127.0.0.1", port)


def test_an_address_where_nothing_listens_fails_within_seconds():
    """In a process of its own: this one may be connected to the session's cluster, and then stays there."""
    program = "from r1ray import cluster; from r1ray.settings import Settings; cluster.connect(Settings(ray_address='127.0.0.1:9'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "R1RAY_"))}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ClusterUnreachable: No Ray cluster answers at 127.0.0.1:9" in done.stderr
    assert time.monotonic() - start < 30
