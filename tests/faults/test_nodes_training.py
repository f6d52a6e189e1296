"""Training on two Ray nodes of one rank each: the ranks' places, the numbers, and a node that dies.

Both nodes are of this machine, with processes of their own.
"""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest

from tests.e2e.running import assert_equal_tensors, read_metrics
from tests.faults.runs import Run, trainer
from tests.launch.hand_made import cluster
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

PLACES = {("alpha", "0"), ("beta", "1")}


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("nodes")) as made:
        made.join("beta")
        yield made


def ranks_on(nodes: dict[str, Run]) -> set[tuple[str, str]]:
    """Node and rank of every process that has one."""
    found = set()
    for name, node in nodes.items():
        for process in node.processes():
            with suppress(psutil.Error, KeyError):
                found.add((name, process.environ()["RANK"]))
    return found


def numbers(run):
    """Metrics that are no times or sizes, by step."""
    return {
        step: {name: value for name, value in data.items() if not name.startswith(("timing", "perf"))}
        for step, data in read_metrics(run).items()
    }


@pytest.mark.parametrize("stage", ["seqkd", "warmup", "gad"])
def test_two_nodes_train_as_two_ranks_of_one_do(two_nodes, folder, tmp_path, stage):
    """The cluster is found as Ray itself finds it; in GAD by RAY_ADDRESS."""
    settings = [f"stage={stage}", "trainer.total_training_steps=2"]
    parts = ["actor"]
    if stage != "seqkd":
        settings += [f"critic.model.path={folder}/base", "critic.optim.lr=1e-3", "trainer.critic_warmup=1"]
        parts.append("critic")
    environment = two_nodes.environment | ({"RAY_ADDRESS": two_nodes.address} if stage == "gad" else {})
    apart = trainer(folder, tmp_path / "apart", *settings, "trainer.nnodes=2", **environment)
    places = set()
    while apart.process.poll() is None:
        places |= ranks_on(two_nodes.nodes)
    said = apart.log.read_text()
    assert apart.end() == 0, said
    assert f"joining the Ray cluster at {two_nodes.address} ({'RAY_ADDRESS' if stage == 'gad' else '/tmp/n'}" in said
    assert places == PLACES

    together = trainer(folder, tmp_path / "together", *settings, "trainer.n_gpus_per_node=2")
    assert together.end() == 0, together.log.read_text()
    assert numbers(tmp_path / "apart") == numbers(tmp_path / "together")
    assert sorted(numbers(tmp_path / "apart")) == [0, 1]
    for part in parts:
        found, expected = (
            read_full_tensors(tmp_path / run / "global_step_2" / part / "model") for run in ("apart", "together")
        )
        assert_equal_tensors(found, expected)


def test_a_node_that_dies_is_named_and_the_next_start_goes_on(two_nodes, folder, tmp_path):
    settings = ["stage=seqkd", "trainer.nnodes=2", "trainer.save_freq=1", "trainer.total_epochs=1000",
                "trainer.max_actor_ckpt_to_keep=2"]  # fmt: skip
    environment = two_nodes.environment | {"RAY_ADDRESS": two_nodes.address}
    run = tmp_path / "run"
    first = trainer(folder, run, *settings, **environment)
    tracker = run / "latest_checkpointed_iteration.txt"
    first.wait_until(lambda: tracker.exists() and int(tracker.read_text()) >= 2, "two checkpoints")
    two_nodes.nodes["beta"].stop()
    assert first.end() == 1
    last = first.log.read_text().strip().splitlines()[-1]
    assert "rank 1 of 2 died in" in last and "node beta (" in last and "is gone" in last, first.log.read_text()

    two_nodes.join("beta")
    saved = int(tracker.read_text())
    again = trainer(folder, run, *settings, f"trainer.total_training_steps={saved + 2}", **environment)
    assert again.end() == 0, again.log.read_text()
    assert sorted(read_metrics(run)) == list(range(saved + 2))
