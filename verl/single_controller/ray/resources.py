"""A check that the cluster holds what a pool asks for, before anything waits for it."""

import time

import ray

# Ray reports what is free a little late: right after ray.init and right after something was given back.
_REPORT_DELAY_S = 2.0


def check_resources(process_on_nodes: list[int], bundle: dict[str, float]) -> None:
    """Compare a pool's demand with the cluster.

    Args:
        process_on_nodes: processes per node.
        bundle: what each process needs, for example {"CPU": 1, "GPU": 1}.

    Raises:
        ValueError: the cluster has too little of something in all, too little of it is free, or some node is too small.
    """
    wanted = {name: amount * sum(process_on_nodes) for name, amount in bundle.items()}
    if _lacking(wanted, ray.cluster_resources()):
        raise ValueError(describe(process_on_nodes, bundle, "The cluster is too small."))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not _fits(process_on_nodes, bundle, nodes):
        raise ValueError(
            describe(process_on_nodes, bundle, "Each node's processes must fit on one node of the cluster.")
        )
    deadline = time.monotonic() + _REPORT_DELAY_S
    while _lacking(wanted, ray.available_resources()):
        if time.monotonic() > deadline:
            raise ValueError(describe(process_on_nodes, bundle, "Other processes or pools hold the rest."))
        time.sleep(0.1)


def describe(process_on_nodes: list[int], bundle: dict[str, float], reason: str) -> str:
    """The text of the error: what was asked for, what there is, and what to do."""
    total, free = ray.cluster_resources(), ray.available_resources()
    asked = ", ".join(f"{name} {amount * sum(process_on_nodes):g}" for name, amount in bundle.items())
    per_node = ", ".join(f"{name} {[amount * count for count in process_on_nodes]}" for name, amount in bundle.items())
    there_is = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in bundle)
    nodes = [{name: node["Resources"].get(name, 0) for name in bundle} for node in ray.nodes() if node["Alive"]]
    return (
        f"not enough resources for {sum(process_on_nodes)} worker processes. "
        f"Asked for: {asked} (per node: {per_node}). The Ray cluster has: {there_is}; by node: {nodes}. {reason} "
        "Lower trainer.n_gpus_per_node or trainer.nnodes, or give Ray more (ray_kwargs.ray_init.num_cpus; more nodes)."
    )


def _lacking(wanted: dict[str, float], there_is: dict[str, float]) -> bool:
    return any(there_is.get(name, 0) < amount for name, amount in wanted.items())


def _fits(process_on_nodes: list[int], bundle: dict[str, float], nodes: list[dict[str, float]]) -> bool:
    """Place the largest demand first, each on the node with the most room for processes."""
    room = [int(min(node.get(name, 0) // amount for name, amount in bundle.items())) for node in nodes]
    for count in sorted(process_on_nodes, reverse=True):
        room.sort()
        room[-1] -= count
        if room[-1] < 0:
            return False
    return True
