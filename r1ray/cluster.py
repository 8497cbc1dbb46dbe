"""The Ray cluster: joining or starting it, and "can this ever be placed?" before anything starts.

Takes settings and resource bundles, gives a description of the cluster. Knows no training and no serving.
`ray` is imported only by `connect`; the placement arithmetic runs without a cluster.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml

from r1ray.environment import prepare_environment
from r1ray.errors import ClusterTooSmall, ClusterUnreachable, PortInUse
from r1ray.settings import Settings

__all__ = [
    "Cluster",
    "Node",
    "check_placement",
    "check_port",
    "connect",
    "num_placeable",
]

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

_EPSILON = 1e-4  # Ray counts resources in ten-thousandths
_MOST_TRIES = 5_000  # of the exact search: far below a second
_CONNECT_TIMEOUT_S = 5.0
_LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")  # where the cluster launcher leaves cluster.yaml on the head node


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine with its total, not free, resources. `planned` nodes do not run yet: the autoscaler may add them."""

    id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    planned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a cluster holds, as seen when connecting."""

    address: str
    nodes: tuple[Node, ...]
    dashboard_url: str | None = None

    def total(self, resource: str) -> float:
        """Sum over the nodes that run or may be added."""
        return sum(node.resources.get(resource, 0.0) for node in self.usable)

    @property
    def usable(self) -> tuple[Node, ...]:
        """Nodes that can ever take work."""
        return tuple(node for node in self.nodes if node.alive)


def connect(settings: Settings | None = None, *, num_cpus: int | None = None) -> Cluster:
    """Join `settings.ray_address` or RAY_ADDRESS, else start a local cluster with `num_cpus` logical CPUs.

    A process that is connected already stays where it is.

    Raises:
        ClusterUnreachable: nothing answers at the address, it refuses us, or the local cluster does not come up.
    """
    prepare_environment()
    settings = settings or Settings()
    address = settings.ray_address or os.environ.get("RAY_ADDRESS") or None
    import ray

    if not ray.is_initialized():
        _start_or_join(address, num_cpus)
    return _describe()


def check_placement(
    cluster: Cluster,
    bundles: Sequence[Mapping[str, float]],
    *,
    strategy: Strategy = "PACK",
    wanted_by: str,
    remedy: str = "",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Refuse what no amount of waiting can place: counts total resources, also of nodes the autoscaler may add.

    `wanted_by` opens the sentence (`training`). `remedy` is what to set instead, where the caller knows it, with `{num}` for the
    number of bundles that fit: `Set train.num_workers={num}`. Only nodes that carry all `labels` count.

    Raises:
        ClusterTooSmall: names the first bundle that cannot be placed and what the cluster holds.
    """
    nodes = [node for node in cluster.usable if all(node.labels.get(key) == value for key, value in (labels or {}).items())]
    wanted = [{name: amount for name, amount in bundle.items() if amount > 0} for bundle in bundles]
    missing = _unplaced([node.resources for node in nodes], wanted, strategy)
    if not missing:
        return
    scope = "".join([_SCOPE[strategy], f" labelled {_listed(labels)}" if labels else ""])
    found = _holds(nodes, wanted[missing[0]], strategy)
    if len(set(map(_listed, wanted))) == 1:
        fitting = len(wanted) - len(missing)
        sentence = f"{wanted_by} wants {len(wanted)} x {_listed(wanted[0])}{scope}; this cluster can ever hold {fitting} {found}."
        instead = remedy.format(num=fitting) if fitting else ""
    else:
        lost = missing[0]
        sentence = (
            f"{wanted_by} wants {len(wanted)} bundles{scope}; number {lost + 1}, {_listed(wanted[lost])}, can never be placed {found}."
        )
        instead = ""
    advice = (instead or "Ask for less").rstrip(".")
    raise ClusterTooSmall(f"{sentence} {advice}{'' if 'add nodes' in advice else ' or add nodes in cluster.yaml'}.")


def num_placeable(cluster: Cluster, bundle: Mapping[str, float]) -> int:
    """How many copies of `bundle` the empty cluster would hold."""
    return sum(_copies(node.resources, bundle) for node in cluster.usable)


def check_port(host: str, port: int) -> None:
    """Raises PortInUse when another process listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"Port {port} on {host} cannot be bound: {error.strerror}. Stop what listens there or choose another port."
            ) from error


def _start_or_join(address: str | None, num_cpus: int | None) -> None:
    import ray
    from ray.exceptions import RayError

    local: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if address is None else {}
    try:
        if address is not None:
            _probe(address)
        ray.init(address=address or "local", logging_level=logging.WARNING, **local)
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ClusterUnreachable(
            f"No Ray cluster answers at {address or 'this machine'}: {reason} (RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}). "
            "Start one with ray start --head, or unset R1RAY_RAY_ADDRESS and RAY_ADDRESS for a local one."
        ) from error


def _probe(address: str) -> None:
    """Ray itself would wait for a minute at a closed port."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def _describe() -> Cluster:
    import ray
    from ray._private.worker import get_dashboard_url

    running = tuple(
        Node(id=entry["NodeID"], resources=dict(entry["Resources"]), labels=dict(entry.get("Labels") or {}), alive=bool(entry["Alive"]))
        for entry in ray.nodes()
    )
    dashboard = get_dashboard_url()
    url = f"http://{dashboard}" if dashboard else None
    planned = tuple(_planned(running, _node_groups()))
    return Cluster(address=ray.get_runtime_context().gcs_address, nodes=running + planned, dashboard_url=url)


@dataclass(frozen=True, slots=True)
class _NodeGroup:
    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    most: int


def _planned(running: Sequence[Node], groups: Iterable[_NodeGroup]) -> Iterator[Node]:
    """Nodes that the autoscaler may still add; nothing on a cluster without one."""
    for group in groups:
        num_running = sum(1 for node in running if node.alive and node.labels.get("ray.io/node-group") == group.name)
        for number in range(max(0, group.most - num_running)):
            yield Node(id=f"{group.name}-{number}", resources=group.resources, labels=group.labels, planned=True)


def _node_groups() -> list[_NodeGroup]:
    """What the autoscaler may start: from Ray's own record where the platform keeps one, else from the launcher's file on the head."""
    import ray
    from ray._private.state import state

    if reported := state.get_cluster_config():
        return [_NodeGroup(group.name, dict(group.resources), {}, group.max_count) for group in reported.node_group_configs]
    here = ray.util.get_node_ip_address()
    on_head = any(entry["NodeManagerAddress"] == here and "node:__internal_head__" in entry["Resources"] for entry in ray.nodes())
    file = _LAUNCHER_CONFIG.expanduser()
    return _launcher_groups(file.read_text(encoding="utf-8")) if on_head and file.exists() else []


def _launcher_groups(text: str) -> list[_NodeGroup]:
    """The worker types of a cluster.yaml; a type without resources (the launcher fills them in on clouds) counts for nothing."""
    config = yaml.safe_load(text) or {}
    types = config.get("available_node_types") or {}
    return [
        _NodeGroup(name, kind["resources"], kind.get("labels") or {}, int(kind.get("max_workers", config.get("max_workers", 0))))
        for name, kind in types.items()
        if name != config.get("head_node_type") and kind.get("resources")
    ]


_SCOPE = {"PACK": "", "SPREAD": "", "STRICT_PACK": " on one node", "STRICT_SPREAD": " on different nodes"}

Free = list[dict[str, float]]


def _unplaced(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]], strategy: Strategy) -> list[int]:
    """Indices of the bundles that find no room in the empty cluster; empty when all do.

    Best fit, largest first, is exact for equal bundles. Mixed ones that it fails are searched exhaustively up to a bound, beyond
    which they pass: a false refusal would be worse than a wait.
    """
    if strategy == "STRICT_PACK":
        tries = [_unplaced([node], bundles, "PACK") for node in nodes]
        return min(tries, key=len, default=list(range(len(bundles))))
    spread = strategy == "STRICT_SPREAD"
    order = sorted(range(len(bundles)), key=lambda index: _weight(bundles[index]), reverse=True)
    missing = _fill([dict(node) for node in nodes], bundles, order, spread=spread)
    if not missing or len(set(map(_listed, bundles))) == 1:
        return sorted(missing)
    impossible = [index for index in missing if not any(_fits(node, bundles[index]) for node in nodes)]
    if impossible:
        return sorted(impossible)
    ordered = [bundles[index] for index in order]
    return [] if _search([dict(node) for node in nodes], ordered, count(), spread=spread) else sorted(missing)


def _fill(free: Free, bundles: Sequence[Mapping[str, float]], order: Sequence[int], *, spread: bool) -> list[int]:
    missing = []
    for index in order:
        room = [node for node in free if _fits(node, bundles[index])]
        if not room:
            missing.append(index)
            continue
        _take(min(room, key=lambda node, bundle=bundles[index]: _left(node, bundle)), bundles[index], spread=spread)  # type: ignore[misc]
    return missing


def _search(free: Free, bundles: Sequence[Mapping[str, float]], tries: Iterator[int], *, spread: bool) -> bool:
    """Whether all bundles fit, by trying every distinct node for the first and recursing; true as well when the bound is reached."""
    if not bundles or next(tries) > _MOST_TRIES:
        return True
    seen: set[str] = set()
    for number, node in enumerate(free):
        if _listed(node) in seen or not _fits(node, bundles[0]):
            continue
        seen.add(_listed(node))
        rest = [dict(other) for other in free]
        _take(rest[number], bundles[0], spread=spread)
        if _search(rest, bundles[1:], tries, spread=spread):
            return True
    return False


def _take(node: dict[str, float], bundle: Mapping[str, float], *, spread: bool) -> None:
    if spread:
        node.clear()
    for name, amount in bundle.items():
        node[name] = node.get(name, 0.0) - amount


def _weight(bundle: Mapping[str, float]) -> tuple[float, ...]:
    return bundle.get("GPU", 0.0), sum(bundle.values())


def _left(node: Mapping[str, float], bundle: Mapping[str, float]) -> tuple[float, ...]:
    """What remains after placing: GPUs are kept together, then CPUs."""
    return node.get("GPU", 0.0) - bundle.get("GPU", 0.0), node.get("CPU", 0.0) - bundle.get("CPU", 0.0)


def _fits(node: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + _EPSILON >= amount for name, amount in bundle.items())


def _copies(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    ratios = [(resources.get(name, 0.0) + _EPSILON) // amount for name, amount in bundle.items() if amount > 0]
    return int(min(ratios, default=0))


def _holds(nodes: Sequence[Node], bundle: Mapping[str, float], strategy: Strategy) -> str:
    """`(2 nodes x 2)`, or what the nodes have of the wanted resources when none holds a single bundle."""
    copies = Counter(min(_copies(node.resources, bundle), 1 if strategy == "STRICT_SPREAD" else 1 << 30) for node in nodes)
    if any(copies):
        return "(" + " + ".join(f"{num} node{'s' * (num > 1)} x {each}" for each, num in sorted(copies.items(), reverse=True) if each) + ")"
    largest = max(nodes, key=lambda node: _weight({name: node.resources.get(name, 0.0) for name in bundle}), default=None)
    held = _listed({name: largest.resources.get(name, 0.0) for name in bundle}) if largest else "none"
    return f"({len(nodes)} node{'s' * (len(nodes) != 1)}; the largest has {held})"


def _listed(amounts: Mapping[str, float] | Mapping[str, str] | None) -> str:
    """`{CPU: 1, GPU: 2}`."""
    shown = {name: f"{value:g}" if isinstance(value, float | int) else value for name, value in (amounts or {}).items()}
    return "{" + ", ".join(f"{name}: {value}" for name, value in sorted(shown.items())) + "}"
