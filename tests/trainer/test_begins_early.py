"""Ray and the ranks' processes begin before the driver loads torch, and are gone when the run is refused or ended."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest

from tests.faults.runs import REPOSITORY, arguments, trainer
from tests.tiny import byte_tokenizer, scorer, write_data, write_model
from verl.trainer.main_ppo import TaskRunner
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import Role
from verl.utils.named import as_named
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker
from verl.workers.rollout_worker import RolloutWorker

# What takes seconds each, and tens of them from a slow disk.
HEAVY = ("torch", "transformers", "tensordict", "pandas", "pyarrow", "scipy", "sympy", "datasets", "vllm")
# What was loaded when Ray was to start, and what the ranks would be sent; then nothing more.
LOADED = f"""
import json, pickle, sys
from verl.trainer import main_ppo
from verl.trainer.ppo.roles import Role

def start(runner, config):
    sent = [pickle.dumps(runner._preparing(config, [role])).hex() for role in Role]
    print(json.dumps([[name for name in {HEAVY} if name in sys.modules], sent]))
    raise SystemExit(0)

main_ppo.TaskRunner.start = start
main_ppo.main()
"""
LIBRARIES = "loading libraries for models and data ..."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("early")
    write_model(path / "base")
    scorer().save_pretrained(path / "critic")
    byte_tokenizer().save_pretrained(path / "critic")
    write_data(path / "train.jsonl", rows=12)
    (path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return path


SEQKD = ("stage=seqkd", "trainer.total_training_steps=1")


@pytest.mark.parametrize("stage", ["seqkd", "warmup", "gad", "gad_short", "soda"])
def test_nothing_that_takes_long_is_loaded_before_ray_starts(folder, tmp_path, stage):
    given = [f"stage={stage}", "actor_rollout_ref.rollout.n=1"] if stage == "soda" else [f"stage={stage}"]
    if stage in ("warmup", "gad", "gad_short"):
        given.append(f"critic.model.path={folder}/critic")
    command = arguments(folder, tmp_path / "run", *given)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *command], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, sent = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    # And what the ranks are sent is read there.
    assert all(callable(pickle.loads(bytes.fromhex(work))) for work in sent)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job", "stage=gad"]])
def test_settings_are_shown_without_what_takes_long_and_without_ray(arguments):
    code = f"import sys; from verl.trainer.main_ppo import main; main(); assert not {{*{HEAVY}}} & {{*sys.modules}}"
    code += "; import ray; assert not ray.is_initialized()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_a_start_that_is_refused_leaves_no_process_of_rays(folder, tmp_path):
    run = trainer(folder, tmp_path / "run", *SEQKD, f"data.train_files={folder}/bad.jsonl")
    try:
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    said = run.log.read_text()
    assert said.index("starting Ray ...") < said.index(LIBRARIES) < said.index("reading data ...")
    assert said.count("\nerror: ") == 1 and "there is no column 'content'" in said and "Traceback" not in said


@pytest.mark.distributed
def test_a_signal_while_libraries_are_loaded_ends_ray_too(folder, tmp_path):
    run = trainer(folder, tmp_path / "run", *SEQKD)
    try:
        run.wait_until(lambda: LIBRARIES in run.log.read_text(), "libraries are loaded")
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    assert "ended by SIGTERM" in run.log.read_text() and "reading tokenizer" not in run.log.read_text()


# ---- classes by name


def test_who_asks_a_runner_for_its_classes_gets_classes():
    workers = {
        Role.ActorRollout: ActorRolloutRefWorker,
        Role.Critic: CriticWorker,
        Role.Rollout: RolloutWorker,
    }
    assert TaskRunner.worker_classes == TaskRunner().worker_classes == workers
    assert TaskRunner.trainer_class is TaskRunner().trainer_class is RayPPOTrainer
    names = as_named(TaskRunner(), "worker_classes")
    assert names == {role: f"{one.__module__}:{one.__qualname__}" for role, one in workers.items()}


def test_a_subclass_names_its_own():
    class Mine(CriticWorker):
        pass

    class Runner(TaskRunner):
        worker_classes = TaskRunner.worker_classes | {Role.Critic: Mine}

    assert Runner.worker_classes[Role.Critic] is Mine
    assert as_named(Runner(), "worker_classes") == Runner().worker_classes
    runner = TaskRunner()
    runner.worker_classes = {Role.Critic: Mine}
    assert as_named(runner, "worker_classes") == runner.worker_classes == {Role.Critic: Mine}
