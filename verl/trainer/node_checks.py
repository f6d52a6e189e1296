"""What the nodes of a run must have in common is looked at before it starts: all that is wrong, node by node."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.config.run import Config
from verl.single_controller.ray import probe
from verl.single_controller.ray.nodes import Node, all_nodes, choose_nodes
from verl.trainer.ppo.folders import run_folder
from verl.utils.refusals import Refused
from verl.utils.rendezvous import PORTS
from verl.utils.units import GIB
from verl.utils.user_code import is_user_function

logger = logging.getLogger(__name__)

PACKAGES = ["torch", "ray", "transformers", "vllm"]
# A node that starts its first process of Python from a slow disk takes its time.
ANSWER_S = 120
LEAST_FREE = GIB
# What this process sends of the module is its code, as nodes may have another package or none.
ray.cloudpickle.register_pickle_by_value(probe)


@dataclass(frozen=True)
class Needs:
    """What a run reads and writes on its nodes. `data` is read by the driver alone."""

    models: list[str]
    data: list[str]
    folder: Path

    @classmethod
    def of(cls, config: Config) -> Needs:
        """A run's, whose settings have absolute paths."""
        parts = [config.actor_rollout_ref.model] + ([config.critic.model] if config.use_critic else [])
        models = [path for part in parts for path in (part.path, part.tokenizer_path) if path is not None]
        loss = config.critic.discriminator.loss
        if config.use_critic and is_user_function(loss):
            models.append(loss.rpartition(":")[0])
        data = [config.data.train_files, config.data.val_files]
        files = [file for part in data if part is not None for file in ([part] if isinstance(part, str) else part)]
        return cls(
            models=list(dict.fromkeys(models)),
            data=[str(Path(file).expanduser().absolute()) for file in files],
            folder=run_folder(config.trainer),
        )


def check_nodes(config: Config) -> None:
    """Look at the nodes that the ranks will be on, and at all of the cluster's where those are too few.

    Raises:
        Refused: the run cannot work there; of everything that is wrong, each is told.
    """
    trainer = config.trainer
    bundle = {"CPU": 1} | ({"GPU": 1} if trainer.device != "cpu" else {})
    nodes = choose_nodes([config.processes_per_node] * trainer.nnodes, bundle)
    problems = []
    if nodes is None:
        nodes = [node for node in all_nodes() if node.alive]
        problems = list(_too_few(nodes, trainer.nnodes, config.processes_per_node, bundle))
    problems += _look(nodes, Needs.of(config))
    if problems:
        raise Refused(problems)
    names = ", ".join(
        f"{node}: rank{'s' if trainer.n_gpus_per_node > 1 else ''} {_ranks(number, trainer.n_gpus_per_node)}"
        for number, node in enumerate(nodes)
    )
    logger.info("%s", names)


def _ranks(number: int, per_node: int) -> str:
    first = number * per_node
    return str(first) if per_node == 1 else f"{first} to {first + per_node - 1}"


def _too_few(nodes: list[Node], wanted: int, per_node: int, bundle: dict[str, float]) -> Iterator[str]:
    where = ray.get_runtime_context().gcs_address
    small = [node for node in nodes if not node.holds(per_node, bundle)]
    if len(nodes) < wanted:
        is_are = "there is one node" if len(nodes) == 1 else f"there are {len(nodes)} nodes"
        yield (
            f"trainer.nnodes={wanted}: {is_are} of the {wanted} in the Ray cluster at {where}: "
            f"{', '.join(map(str, nodes))}. Start Ray on the others (--worker {where}, or `ray start "
            f"--address={where}`), or say --nnodes {len(nodes)}"
        )
    elif not small:
        yield (
            f"trainer.nnodes={wanted}: the Ray cluster at {where} has {len(nodes)} nodes, and fewer than {wanted} have "
            "room now: another run is at work there; wait for it, or end it"
        )
    for node in small:
        has = ", ".join(f"{node.resources.get(name, 0):g} {name}" for name in bundle)
        yield (
            f"node {node}: it has {has}, and trainer.n_gpus_per_node={per_node} asks for {per_node} of each: lower it "
            "(N_GPUS_PER_NODE for the stage scripts), or give Ray more there (`ray start --num-cpus`, `--num-gpus`)"
        )


def _look(nodes: list[Node], needs: Needs) -> list[str]:
    """Ask all nodes at once."""
    mark = f".nodes_{secrets.token_hex(8)}"
    asked, answers = needs.folder / mark, {node.id: f"{mark}.{node.id[:12]}" for node in nodes}
    probes = {
        node.id: ray.remote(probe.NodeProbe)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote()
        for node in nodes
    }
    paths = [*needs.models, *needs.data]
    try:
        asked.touch()
        looks = {
            node: probes[node.id].look.remote(PACKAGES, paths, str(needs.folder), mark, answers[node.id])
            for node in nodes
        }
        here = {"versions": probe.versions(PACKAGES), "code": probe.code_of("verl")}
        here["paths"] = {path: probe.sizes(path) for path in paths}
        found, problems = _answers(looks)
        for node, look in found.items():
            problems += _differences(node, look, here, needs)
            problems += _not_shared(node, look, needs.folder, needs.folder / answers[node.id])
        problems += _unreachable(list(found), probes)
    finally:
        for file in (asked, *(needs.folder / answer for answer in answers.values())):
            file.unlink(missing_ok=True)
        for actor in probes.values():
            ray.kill(actor)
    return problems


def _answers(calls: dict[Node, ray.ObjectRef]) -> tuple[dict[Node, Any], list[str]]:
    """What nodes say within `ANSWER_S`, and what is wrong with the others."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    found, problems = {}, []
    for node, call in calls.items():
        if call not in ready:
            problems.append(f"node {node}: it has not answered for {ANSWER_S} s: end it, or see its logs in /tmp/ray")
            continue
        try:
            found[node] = ray.get(call)
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1]
            problems.append(f"node {node}: no process can be started there: {said}")
    return found, problems


def _differences(node: Node, there: dict, here: dict, needs: Needs) -> Iterator[str]:
    """Where the node is not as the driver's machine."""
    for name, version in here["versions"].items():
        if version is not None and there["versions"][name] != version:
            has = there["versions"][name] or "none"
            how = f"pip install {name}=={version}" if name != "python" else "make the environments with the same one"
            yield f"node {node}: {name} there is {has}, the driver's is {version}: {how}"
    if there["code"] is None:
        yield f"node {node}: it has no package verl: install it there, or set PYTHONPATH before Ray is started there"
    elif there["code"][1] != here["code"][1]:
        yield (
            f"node {node}: the code of verl in {there['code'][0]} differs from the driver's in {here['code'][0]}: give "
            "all nodes the same commit"
        )
    for path in needs.models:
        yield from _other_files(f"node {node}", path, there["paths"][path], here["paths"][path])
    for path in needs.data:
        if isinstance(there["paths"][path], str):
            # The driver reads the data for all; it matters when the run goes on from another machine.
            logger.warning("node %s: %s cannot be read there (%s)", node, path, there["paths"][path])
    if there["free"] < LEAST_FREE:
        yield (
            f"node {node}: {there['free'] / GIB:.2f} GiB are free where Ray keeps what does not fit into memory, "
            "expected 1: make room, or start Ray there with RAY_TMPDIR on another disk"
        )


def _other_files(where: str, path: str, there: dict[str, int] | str, here: dict[str, int] | str) -> Iterator[str]:
    way_out = "put it on storage that all nodes see, at the same path, or copy it there"
    if isinstance(there, str):
        yield f"{where}: {path} cannot be read ({there}): {way_out}"
    elif there != here and isinstance(here, dict):
        other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        yield f"{where}: {path} differs from the driver's in {', '.join(other[:3])}: {way_out}"


def _not_shared(node: Node, there: dict, folder: Path, answer: Path) -> Iterator[str]:
    said = there["shares"]
    if said is None and not answer.exists():
        said = "a file that the node writes there is not seen by the driver"
    if said is not None:
        yield (
            f"node {node}: {folder} is not shared with the driver: {said}. Put trainer.default_local_dir on storage "
            "that all nodes see and may write"
        )


def _unreachable(nodes: list[Node], probes: dict[str, Any]) -> list[str]:
    """Whether every node can connect to every other where the ranks meet."""
    calls = {node: probes[node.id].listen.remote(node.address, PORTS) for node in nodes}
    ports, problems = _answers(calls)
    problems += [
        f"node {node}: no port from {PORTS[0]} to {PORTS[-1]}, where the ranks meet, is free at {node.address}: end "
        "what holds them"
        for node, port in ports.items()
        if port is None
    ]
    open_at = {node: port for node, port in ports.items() if port is not None}
    places = [(node.address, port) for node, port in open_at.items()]
    said, silent = _answers({node: probes[node.id].reach.remote(places) for node in ports})
    for node, answers in said.items():
        problems += [
            f"node {node}: no connection to {other} at port {port} ({why}): let the nodes reach each other at all "
            f"ports (ranks meet at {PORTS[0]} to {PORTS[-1]}; NCCL, gloo and Ray draw others)"
            for (other, port), why in zip(open_at.items(), answers, strict=True)
            if why is not None
        ]
    return problems + silent
