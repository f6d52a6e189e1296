"""The ranks' processes as the machines they run on know them, whether the ranks answer or not."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.utils.stacks import processes_with, report, state
from verl.utils.stalls import witnesses

# An environment variable that the processes of one group share.
MARK = "VERL_WORKER_GROUP"
OTHER_NODES_S = 30
# States in which a process does not go on by itself.
STUCK = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)


class RankProcesses:
    """The processes of one group. Until it is dropped, a watch that ends the run asks them for their stacks.

    Args:
        mark: the value of `MARK` in their environment.
        nodes: the Ray node of each rank.
    """

    def __init__(self, mark: str, nodes: list[str]):
        self.mark, self.nodes = mark, nodes
        witnesses.add(self)

    def stuck(self, ranks: Iterable[int]) -> dict[int, str]:
        """The states of those of the ranks whose process is on this machine and stands still."""
        here = _ranks_here(self.mark)
        states = {rank: state(here[rank]) for rank in ranks if rank in here}
        return {rank: found for rank, found in states.items() if found in STUCK}

    def reports(self) -> list[str]:
        """State and stacks of every rank."""
        found = _reports_here(self.mark)
        own = ray.get_runtime_context().get_node_id()
        calls = [
            ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(_reports_here)
            .remote(self.mark)
            for node in sorted(set(self.nodes) - {own})
        ]  # fmt: skip
        answered = ray.wait(calls, num_returns=len(calls), timeout=OTHER_NODES_S)[0] if calls else []
        for call in answered:
            try:
                found |= ray.get(call)
            except ray.exceptions.RayError as error:
                found |= {rank: f"its node said {error}" for rank in range(len(self.nodes)) if rank not in found}
        unknown = "nothing can be learned of its process"
        return [f"rank {rank} of {len(self.nodes)}: {found.get(rank, unknown)}" for rank in range(len(self.nodes))]


def _ranks_here(mark: str) -> dict[int, psutil.Process]:
    found = {}
    # Children of a rank have its environment; it is the oldest.
    for process in processes_with(MARK, mark):
        # A process may end between two looks.
        with suppress(psutil.Error, OSError, LookupError):
            found.setdefault(int(process.environ()["RANK"]), process)
    return found


def _reports_here(mark: str) -> dict[int, str]:
    ranks = _ranks_here(mark)
    with ThreadPoolExecutor(max(1, len(ranks))) as pool:
        return dict(zip(ranks, pool.map(report, ranks.values()), strict=True))
