"""Images, the SLURM script, the KubeRay file and all shell scripts, as far as they can be tried without a cluster."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = {
    "docker/Dockerfile": "-e . -c constraints.txt",
    "docker/Dockerfile.gpu": "-e '.[gpu]' 'ray[default]' -c constraints-gpu.txt",
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("examples/**/*.sh")]
)
DOCS = (ROOT / "docs" / "nodes.md").read_text()


def linter(name: str) -> str:
    """A program that the extra `test` brings."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def test_shell_scripts():
    assert "examples/cluster/slurm.sh" in SCRIPTS and len(SCRIPTS) >= 7
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", ROOT / script], check=True)
    done = subprocess.run(
        [linter("shellcheck"), "-x", "-P", "SCRIPTDIR", *SCRIPTS, ".ci/run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES)
def test_dockerfiles_are_clean(file):
    done = subprocess.run([linter("hadolint"), file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def instructions(file: str) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_gets_what_is_there_and_installs_as_we_do(file):
    steps = instructions(file)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [source for step, text in steps if step == "COPY" for source in text.split()[:-1]]
    assert {"verl", "scripts", "examples", "requirements.txt", "setup.py", "README.md"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, f"{line[1:]}*") for line in ignored if line.startswith("!")), source
    installs = [part.split("pip install ")[1] for step, text in steps if step == "RUN"
                for part in text.split(" && ") if "pip install " in part]  # fmt: skip
    assert installs[-1] == DOCKERFILES[file]
    makefile = (ROOT / "Makefile").read_text()
    assert installs[0] in makefile.replace("--quiet ", "")
    if file == "docker/Dockerfile":
        torch = re.search(r"^TORCH \?= (\S+)$", makefile, re.M)[1]
        assert ("ARG", f"TORCH={torch}") in steps and installs[1].startswith('"$TORCH"')
        assert torch in (ROOT / "constraints.txt").read_text().splitlines()
    assert steps[-1] == ("CMD", '["bash"]') and ("USER", "1000") in steps
    command = re.search(r"docker build .*", (ROOT / file).read_text())[0]
    assert command.startswith(f"docker build -f {file} ")


RECORDING = """#!{python}
import json, os, sys
told = {{name: value for name, value in os.environ.items() if name.startswith(("SLURM", "RAY", "N_GPUS"))}}
with open({file!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], told]) + "\\n")
"""
NODES = "import subprocess\nprint('node7\\nnode8')\n"
# In SLURM's place: the command, once for each node.
STEPS = """import subprocess
command = sys.argv[sys.argv.index("bash"):]
for number in range(2):
    subprocess.run(command, check=True, env=os.environ | {"SLURM_PROCID": str(number)})
"""


def recording(folder: Path, name: str, more: str = "") -> Path:
    """A program that writes down how it was called, and then does `more`."""
    program = folder / name
    program.write_text(RECORDING.format(python=sys.executable, file=str(folder / "calls")) + more)
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in (folder / "calls").read_text().splitlines()]


def started(recorded: list[tuple]) -> list[tuple]:
    """Without the questions that the stage scripts ask Python first (-c)."""
    return [call for call in recorded if call[1][0] != "-c"]


def test_the_slurm_script_starts_head_and_worker_with_one_token(tmp_path):
    recording(tmp_path, "scontrol", NODES)
    recording(tmp_path, "srun", STEPS)
    # The first call makes the token.
    token = "if sys.argv[1] == '-c': print('a' * 64)\n"
    python = recording(tmp_path, "python", token)
    command = [
        "examples/cluster/slurm.sh",
        "scripts/train/gpt5-8b-SeqKD-gspo.sh",
        "--model",
        "a model",
        "--exp_name",
        "x",
    ]
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    done = subprocess.run(["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "head: node7:14567; nodes: node[7-8]" in done.stdout
    (nodes, hostnames, _), (make, _, _), (srun, flags, _), *asked_and_started = calls(tmp_path)
    assert (nodes, hostnames, make, srun) == ("scontrol", ["show", "hostnames", "node[7-8]"], "python", "srun")
    assert flags[:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--label"]
    (_, head, of_head), (_, worker, of_worker) = started(asked_and_started)
    assert head[:8] == ["-m", "verl.launch", "--head", "--nnodes", "2", "--port", "14567", "--"]
    assert {"actor_rollout_ref.model.path=a model", "trainer.nnodes=2", "trainer.n_gpus_per_node=8"} <= set(head)
    assert worker == ["-m", "verl.launch", "--worker", "node7:14567"]
    assert of_head["RAY_AUTH_TOKEN"] == of_worker["RAY_AUTH_TOKEN"] == "a" * 64
    # The line that the docs and the script's head show, and no nodes to start on.
    line = (
        "sbatch --nodes=2 examples/cluster/slurm.sh scripts/train/gpt5-8b-SeqKD-gspo.sh --model MODEL --exp_name NAME"
    )
    assert line in DOCS and line in (ROOT / command[0]).read_text()
    assert subprocess.run(["bash", command[0]], cwd=ROOT, env=environment, capture_output=True).returncode == 2


# The fields that we use, as KubeRay's reference of ray.io/v1 and Kubernetes' of pods have them. A list: of such.
CONTAINER = {
    "name": str,
    "image": str,
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
POD = {
    "metadata": {"labels": dict},
    "spec": {
        "terminationGracePeriodSeconds": int,
        "securityContext": {"fsGroup": int},
        "containers": [CONTAINER],
        "volumes": [VOLUME],
    },
}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": dict, "template": POD},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": dict,
                    "template": POD,
                }
            ],
        },
    },
}


def faults(value, shape, where="") -> list[str]:
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list"]
        return [fault for number, one in enumerate(value) for fault in faults(one, shape[0], f"{where}[{number}]")]
    if isinstance(shape, dict):
        unknown = [f"{where}.{name}: unknown" for name in value.keys() - shape.keys()]
        return unknown + [
            fault for name in value.keys() & shape for fault in faults(value[name], shape[name], f"{where}.{name}")
        ]
    if shape is dict:
        return [f"{where}.{name}: expected text" for name, text in value.items() if not isinstance(text, str)]
    return [] if type(value) is shape else [f"{where}: expected {shape.__name__}, got {value!r}"]


def test_the_kuberay_file_has_known_fields_that_agree(tmp_path):
    job, policy = yaml.safe_load_all((ROOT / "examples/cluster/kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"], policy["kind"]) == ("ray.io/v1", "RayJob", "NetworkPolicy")
    assert faults(job, RAY_JOB) == []
    spec = job["spec"]["rayClusterSpec"]
    # The image's. KubeRay hands out a token from 2.52 on, and this package asks for 2.59.
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints-gpu.txt").read_text().splitlines()
    assert spec["authOptions"] == {"mode": "token"} and tuple(map(int, spec["rayVersion"].split("."))) >= (2, 59)
    [workers] = spec["workerGroupSpecs"]
    pod = spec["headGroupSpec"]["template"]
    assert workers["template"] == pod and workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    assert pod["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
    [container] = pod["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert f"docker build -f docker/Dockerfile.gpu -t {container['image']} ." in DOCS

    # The entrypoint, run with a Python that writes down what it is asked for.
    python = recording(tmp_path, "python")
    entrypoint = shlex.split(job["spec"]["entrypoint"].replace("/opt/verl", str(ROOT)))
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "DATA_DIR": "/srv/verl/data"}
    done = subprocess.run(entrypoint, env=environment)
    assert done.returncode == 0
    [(_, arguments, _)] = started(calls(tmp_path))
    gpus, nodes = container["resources"]["limits"]["nvidia.com/gpu"], 1 + workers["replicas"]
    assert arguments[:3] == ["-m", "verl.trainer.main_ppo", "stage=seqkd"]
    assert {f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={gpus}"} <= set(arguments)
    assert "kubectl apply -f examples/cluster/kuberay.yaml" in DOCS
    for option in arguments[3:]:
        path = option.partition("=")[2]
        assert not path.startswith("/") or path.startswith("/srv/verl/"), "not on the volume"


def test_commands_in_the_docs_name_what_is_there():
    for path in set(re.findall(r"(?:scripts|examples|docker|tests|docs)/[\w./-]+\w", DOCS)):
        assert (ROOT / path).exists(), path
    done = subprocess.run([sys.executable, "-m", "verl.launch", "--help"], cwd=ROOT, capture_output=True, text=True)
    flags = re.findall(r"^\| `(--[\w]+)", DOCS, re.M)
    assert len(flags) == 5 and [flag for flag in flags if f"{flag} " not in done.stdout] == []
