"""Joining a cluster or starting one: what stands in the way is said, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from tests.faults.small_disk import small_disk
from verl.single_controller.ray import starting
from verl.trainer.config import compose_config
from verl.trainer.main_ppo import TaskRunner, run_ppo
from verl.utils import socket_folder


@pytest.fixture
def local_ray():
    assert not ray.is_initialized()
    ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


CONFIG = ("trainer.experiment_name=x", "data.train_files=/d", "actor_rollout_ref.model.path=/m", "trainer.device=cpu")


def test_an_address_where_nobody_listens_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, so that nobody else takes it; not listening
        monkeypatch.setattr(starting, "HEALTH_CHECK_SECONDS", 10)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConnectionError, match=rf"^RAY_ADDRESS: expected a Ray cluster .* at {address}"):
            starting.join_or_start(None, None)
        with pytest.raises(ConnectionError, match=r"^ray_kwargs\.ray_init\.address: expected"):
            starting.join_or_start(address, None)


def test_somebody_else_who_listens_there_is_no_cluster(monkeypatch):
    monkeypatch.setattr(starting, "HEALTH_CHECK_SECONDS", 10)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionError, match="unset RAY_ADDRESS"):
            starting.check_answers(f"127.0.0.1:{silent.getsockname()[1]}", "RAY_ADDRESS")


@pytest.mark.distributed
def test_a_cluster_that_answers_is_joined(local_ray):
    starting.check_answers(ray.get_runtime_context().gcs_address, "RAY_ADDRESS")


def test_folders_that_sockets_do_not_fit_under(monkeypatch, caplog):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(socket_folder, "_check", lambda *_: None)
    monkeypatch.setenv("TMPDIR", "/" + "a" * 38)  # 39 bytes and /ray: 43
    assert socket_folder.session_folder() is None
    monkeypatch.setenv("TMPDIR", "/" + "a" * 39)
    assert socket_folder.session_folder() == "/tmp/ray"
    assert "TMPDIR: expected" in caplog.text and "which has 44" in caplog.text
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert socket_folder.session_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/" + "长" * 14)  # three bytes each
    monkeypatch.setattr(socket_folder, "SHORT_FOLDER", "/proc/none")
    with pytest.raises(ValueError, match=r"RAY_TMPDIR: expected .* set RAY_TMPDIR to a short folder"):
        socket_folder.session_folder()


def test_a_full_disk_for_rays_files_is_said_before_ray_waits_for_them(monkeypatch):
    """Ray itself waits for half a minute, and then for a file of a name that says nothing. A short path: in /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, small_disk(Path(folder) / "d", "17m") as disk:
        monkeypatch.setenv("RAY_TMPDIR", str(disk))
        assert socket_folder.session_folder() is None
        (disk / "fill").write_bytes(b"x" * (2 << 20))
        words = rf"^RAY_TMPDIR: the disk of {disk}/ray, .*, is full: 15\.00 MiB are free, expected 16: make room"
        with pytest.raises(OSError, match=words):
            starting.join_or_start(None, 1)
    assert not ray.is_initialized()


def test_a_folder_for_rays_files_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(OSError, match=r"^RAY_TMPDIR: /proc/none/ray, .*, cannot be written: set RAY_TMPDIR to another"):
        starting.join_or_start(None, 1)
    assert not ray.is_initialized()


@pytest.mark.distributed
def test_a_process_that_has_used_ray_before_starts_it_with_a_token_of_its_own(tmp_path):
    """As in a notebook: Ray keeps the token that it had there, and its new processes would not take it."""
    code = (
        "import os, ray; from verl.single_controller.ray.starting import start_alone, stop\n"
        "def cluster(): ray.init(address='local', num_cpus=1, include_dashboard=False, _node_ip_address='127.0.0.1')\n"
        "cluster(); ray.shutdown(); assert 'RAY_AUTH_TOKEN' not in os.environ\n"
        "start_alone(1); assert ray.get(ray.remote(lambda: os.environ['RAY_AUTH_TOKEN']).remote()); stop()\n"
        "cluster(); ray.shutdown()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_ray_starts_below_a_long_temporary_folder(tmp_path):
    folder = tmp_path / ("a-rather-long-job-directory" * 3)
    folder.mkdir()
    code = "import ray; from verl.single_controller.ray.starting import join_or_start as j; j(None, 1); ray.shutdown()"
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_TMPDIR", "RAY_ADDRESS")}
    environment |= {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


NICE = """
import os, ray
from verl.single_controller.ray.starting import start_alone, stop
start_alone(1)
print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
stop()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [None, "2"])
def test_workers_are_as_nice_as_the_driver_unless_asked(asked):
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", starting.NICENESS)}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])} | ({starting.NICENESS: asked} if asked else {})
    done = subprocess.run([sys.executable, "-c", NICE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == [asked or "0"], done.stderr


class IdleRunner(TaskRunner):
    """Starts Ray and trains nothing."""

    def run(self, config):
        self.start(config)


@pytest.mark.distributed
def test_a_run_leaves_its_callers_ray_alone(local_ray):
    run_ppo(compose_config(list(CONFIG)), IdleRunner)
    assert ray.is_initialized()
