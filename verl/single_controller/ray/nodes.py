"""The machines of a Ray cluster: their names, which of them hold a run's ranks, and which are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

import ray
from ray._private.state import available_resources_per_node


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `resources` are its own, for example {"CPU": 8, "GPU": 8}."""

    id: str
    name: str
    address: str
    alive: bool
    resources: Mapping[str, float] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"

    def holds(self, count: int, bundle: Mapping[str, float]) -> bool:
        """Whether so many processes fit, of which each needs what the bundle says."""
        return all(self.resources.get(name, 0) >= amount * count for name, amount in bundle.items())


def all_nodes() -> list[Node]:
    """Every node that ever was in the cluster, in the ranks' order: the driver's own machine, then by address."""
    own = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(
            id=node["NodeID"],
            # Ray takes the address for the name of a node that was given none.
            name=node["NodeName"] if node["NodeName"] != node["NodeManagerAddress"] else node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            alive=node["Alive"],
            resources=node["Resources"],
        )
        for node in ray.nodes()
    ]
    return sorted(nodes, key=lambda node: (node.id != own, _by_number(node.address), node.name, node.id))


def _by_number(address: str) -> tuple[int, int]:
    """An address as a number, so that 10.0.0.9 comes before 10.0.0.10. Names come last."""
    try:
        ip = ip_address(address)
    except ValueError:
        return 9, 0
    return ip.version, int(ip)


def choose_nodes(process_on_nodes: list[int], bundle: Mapping[str, float]) -> list[Node] | None:
    """A node of its own for the processes of each entry, those with room for them now, in the ranks' order; None where
    there are too few such nodes."""
    free = available_resources_per_node()
    nodes = [node for node in all_nodes() if node.alive]
    chosen: list[Node] = []
    for count in process_on_nodes:
        fitting = [
            node
            for node in nodes
            if node not in chosen
            and node.holds(count, bundle)
            and all(free.get(node.id, {}).get(name, 0) >= amount * count for name, amount in bundle.items())
        ]
        if not fitting:
            return None
        chosen.append(fitting[0])
    return chosen
