"""The launcher's flags, its token, and what the stage scripts hand on. With Ray: tests/faults/test_nodes_launched.py"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from verl.launch import cluster_token, run
from verl.launch.cluster_token import TokenFault, take
from verl.launch.command import main
from verl.launch.orders import Orders
from verl.utils.signals import EndedBySignal

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_token_and_no_log_of_its_own(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        # Set first, so that what `take` sets goes with the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(run, "log_to_terminal", nothing)


def nothing():
    pass


def test_the_head_makes_a_token_that_its_owner_alone_can_read_and_a_worker_waits_for_it(tmp_path, monkeypatch):
    file = tmp_path / "shared" / "token"
    made = []
    late = threading.Timer(0.3, lambda: made.append(cluster_token._make(file)))
    late.start()
    assert take(file, 10, nothing) is None
    late.join()
    assert made == [file] and file.stat().st_mode & 0o777 == 0o600
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
    # A head that starts again takes the one that is there, and leaves it there.
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert take(file, 0, nothing) is None and os.environ["RAY_AUTH_TOKEN"] == token
    assert [path.name for path in file.parent.iterdir()] == ["token"]
    # One's own goes before any file.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    assert take(tmp_path / "none", 0, nothing) is None and not (tmp_path / "none").exists()


def test_a_token_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "token"
    with pytest.raises(TokenFault, match="is not there: start the head"):
        take(file, 0.1, nothing)
    file.write_text("x" * 64)
    file.chmod(0o640)
    with pytest.raises(TokenFault, match=f"can be read by others, who could run code here: chmod 600 {file}"):
        take(file, 1, nothing)
    file.chmod(0o600)
    file.write_text("x" * 31)
    with pytest.raises(TokenFault, match="token: expected a token of 32 characters or more, got 31"):
        take(file, 1, nothing)
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(TokenFault, match=r"folder cannot be read \(Is a directory\)"):
        take(tmp_path / "folder", 1, nothing)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    with pytest.raises(TokenFault, match="named is not there"):
        take(file, 0, nothing)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "short")
    with pytest.raises(TokenFault, match="RAY_AUTH_TOKEN: expected a token of 32 characters or more, got 5"):
        take(file, 0, nothing)


def test_flags_that_make_no_sense_are_refused(capsys):
    for flags, said in (
        ([], "one of the arguments --head --worker is required"),
        (["--head", "--worker", "a"], "not allowed with argument"),
        (["--head", "--nnodes", "2"], "needs --nnodes N and, behind --, the command"),
        (["--head", "--", "true"], "needs --nnodes N"),
        (["--head", "--nnodes", "1", "--", "true"], "expected a whole number from 2, got '1'"),
        (["--head", "--nnodes", "2", "--", "no_such_program"], "there is no program no_such_program to run"),
        (["--worker", "a", "--", "true"], "a worker runs no command"),
    ):
        with pytest.raises(SystemExit) as end:
            main(flags)
        assert end.value.code == 2 and said in capsys.readouterr().err, flags


def test_a_worker_without_a_head_gives_up_and_says_where_it_looked(caplog, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["--worker", address, "--wait", "1"]) == 1
    assert f"nobody listens at {address}, where the head should be, after 1 s (--wait)" in caplog.text


def test_a_port_that_is_taken_is_said(caplog, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--head", "--nnodes", "2", "--node_ip", "127.0.0.1", "--port", port, "--", "true"]) == 1
    assert f"port {port} of this machine is taken" in caplog.text


def test_a_signal_counts_once_in_a_second_and_ends_a_wait(monkeypatch):
    orders = Orders()
    with orders.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(EndedBySignal, match="SIGTERM"):
            orders.stop_if_any()
        assert (orders.take(), orders.take()) == (signal.SIGINT, None)


def stage_script(tmp_path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """What a stage script would run: `python` writes down its arguments, but for a question (-c)."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = REPOSITORY / "scripts" / "train" / "gpt5-8b-SeqKD-gspo.sh"
    return subprocess.run(
        ["bash", script, *flags], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "N_GPUS_PER_NODE": "8"} | environment,
    )  # fmt: skip


def test_what_the_stage_scripts_hand_on(tmp_path):
    training = ["--model", "m", "--exp_name", "x", "--nnodes", "2"]
    head = stage_script(tmp_path, "--head", *training, "--port", "7000", LAUNCH_FLAGS="--wait 60 --node_ip 10.0.0.1")
    python = str(tmp_path / "python")
    expected = [
        "-m",
        "verl.launch",
        "--head",
        "--nnodes",
        "2",
        "--port",
        "7000",
        "--wait",
        "60",
        "--node_ip",
        "10.0.0.1",
    ]
    assert head.stdout.splitlines()[:15] == [*expected, "--", python, "-m", "verl.trainer.main_ppo"]
    assert {"trainer.nnodes=2", "trainer.n_gpus_per_node=8"} <= set(head.stdout.splitlines()[15:])
    # The same line on every machine, but for the address.
    for flags in ([], training):
        worker = stage_script(tmp_path, "--worker", "10.0.0.1:7000", *flags)
        assert worker.stdout.splitlines() == ["-m", "verl.launch", "--worker", "10.0.0.1:7000"]
    alone = stage_script(tmp_path, "--model", "m", "--exp_name", "x")
    assert alone.stdout.splitlines()[:2] == ["-m", "verl.trainer.main_ppo"]
    # Settings are shown where they are, and nothing is started for it.
    shown = stage_script(tmp_path, "--head", *training, "--cfg", "job")
    assert shown.stdout.splitlines()[:2] == ["-m", "verl.trainer.main_ppo"] and "--cfg" in shown.stdout
    worker = stage_script(tmp_path, "--worker", "a", *training, "--cfg", "job")
    assert (worker.returncode, worker.stdout) == (0, "") and "the head shows the settings" in worker.stderr
    port = stage_script(tmp_path, *training, "--port", "7000")
    assert port.returncode == 2 and "goes with --head or --worker" in port.stderr
    both = stage_script(tmp_path, "--head", "--worker", "a", *training)
    assert both.returncode == 2 and "this machine is one of them" in both.stderr
