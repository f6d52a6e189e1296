"""What is wrong with the nodes of a run is said before it starts: every problem, with node and way out."""

from __future__ import annotations

import subprocess

import pytest

from tests.faults.runs import trainer
from tests.launch.hand_made import cluster
from tests.tiny import write_data, write_model

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

APART = (
    'mount -t tmpfs none "$1" && mount -t tmpfs none "$2" && mount -t tmpfs -o size=512m none "$3" && shift 3 && '
    'exec "$@"'
)


def test_everything_that_is_wrong_with_a_node_is_said_at_once(tmp_path):
    """A node whose model, checkpoints and temporary folder are other ones, with another torch, other code of ours and
    too few CPUs; before, a cluster without it."""
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mounts of its own, as root: {error}")
    write_model(tmp_path / "base")
    write_data(tmp_path / "train.jsonl", rows=18)
    (tmp_path / "run").mkdir()
    with cluster(tmp_path) as made:
        command = (tmp_path, tmp_path / "run", "stage=seqkd", "trainer.nnodes=2", "data.train_batch_size=4")
        alone = trainer(*command, **made.environment)
        assert alone.end() == 1
        said = alone.log.read_text()
        assert "Traceback" not in said
        [few] = [line for line in said.splitlines() if line.startswith("error: ")]
        assert f"trainer.nnodes=2: there is one node of the 2 in the Ray cluster at {made.address}: alpha (" in few

        other = tmp_path / "other"
        (other / "torch-9.9.9.dist-info").mkdir(parents=True)
        (other / "torch-9.9.9.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n"
        )
        (other / "verl").mkdir()
        (other / "verl" / "__init__.py").write_text("")
        places = [str(tmp_path / "base"), str(tmp_path / "run"), made.environment["RAY_TMPDIR"]]
        before = ["unshare", "--mount", "bash", "-c", APART, "bash", *places]
        made.join("beta", cpus=0, before=before, PYTHONPATH=str(other))
        both = trainer(*command, **made.environment)
        assert both.end() == 1
    said = both.log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: node beta (")]
    for text in (
        "it has 0 CPU, and trainer.n_gpus_per_node=1 asks for 1",
        "torch there is 9.9.9, the driver's is",
        "differs from the driver's in",
        "base differs from the driver's in",
        "run is not shared with the driver: a file that the driver writes there is not seen",
        "GiB are free where Ray keeps what does not fit into memory",
    ):
        assert any(text in line for line in lines), f"{text}\n{said}"
    assert "node alpha" not in said and "Traceback" not in said
    assert list((tmp_path / "run").glob(".nodes_*")) == []
