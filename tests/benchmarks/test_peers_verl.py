"""Upstream verl as a peer: what it is given and how it is read; and its own runs, where a folder with it is named.

`BENCHMARK_PEER_PATH=DIR` names the folder: pip install --target DIR --no-deps verl==0.9.1 transformers==5.9.0
tensordict==0.10.0 and what they need beside torch.
"""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import peers, peers_verl, step
from benchmarks.common import ROOT
from benchmarks.inputs import FIRST_TEXT_ID, model_folder, word_tokenizer
from benchmarks.peers_common import sft_rows
from benchmarks.peers_verl import PeerError, PeerRun
from benchmarks.shapes import SHAPES
from tests.tiny import answer_rows

PEER_PATH = os.environ.get("BENCHMARK_PEER_PATH")
with_upstream = pytest.mark.skipif(PEER_PATH is None, reason="BENCHMARK_PEER_PATH names no folder with upstream verl")
# Words begin behind the special tokens and the 256 letters.
FIRST_WORD_ID = FIRST_TEXT_ID + 256


def parsed(*options: str, folder: Path | str = "peer"):
    fixed = ["--shape", "tiny", "--device", "cpu", "--peer", "verl", "--peer-path", str(folder), "--peer-tokens", "256"]
    return peers.arguments().parse_args([*fixed, "--warmup", "1", "--steps", "1", *options])


def settings_of(command: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in command if "=" in one and not one.startswith("-"))


# ---- what upstream is given


def compute_score(text: str) -> float:
    spec = spec_from_file_location("benchmark_reward", peers_verl.FOR_UPSTREAM / "benchmark_reward.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score("benchmark", text, "", extra_info={"index": 0})


def test_reward_by_hand():
    assert compute_score(" w0 w1 w2 w4") == 0.75
    assert compute_score(" w11 w20") == 0.5
    assert compute_score("no words") == 0.0


def test_reward_is_the_rule_of_ours_on_what_a_model_writes():
    ids = torch.randint(FIRST_WORD_ID, 510, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert compute_score(word_tokenizer(512).decode(ids)) == pytest.approx(step.even_share(ids))


def test_sft_rows_have_the_lengths_of_ours(tmp_path):
    prompts, answers = [4, 9, 15], [7, 1, 15]
    peers_verl.write_sft_rows(tmp_path / "rows.parquet", answer_rows(prompts, answers))
    tokenizer = word_tokenizer(512)

    def tokens(messages: list[dict], **options: bool) -> int:
        return len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **options)).input_ids)

    conversations = pq.read_table(tmp_path / "rows.parquet").to_pydict()["messages"]
    assert [tokens(one[:1], add_generation_prompt=True) for one in conversations] == prompts
    assert [tokens(one) for one in conversations] == [p + a for p, a in zip(prompts, answers, strict=True)]


def test_prompts_are_those_of_the_step(tmp_path):
    args = parsed("--prompts", "3")
    peers_verl.write_prompts(tmp_path / "prompts.parquet", args)
    written = pq.read_table(tmp_path / "prompts.parquet").to_pydict()
    assert written["prompt"] == [row["content"] for row in step.random_texts(12, step.TINY_LENGTHS)]
    assert set(written) == {"prompt", "data_source", "reward_model", "extra_info"}


def test_commands_say_what_is_compared(tmp_path):
    args = parsed("--prompts", "4", "--n", "2", "--peer-set", "trainer.use_v1=False", "data.seed=3", folder=tmp_path)
    command = peers_verl.grpo_command(args, Path("models"), Path("data"), "packed")
    assert command[:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    given, actor = settings_of(command), "actor_rollout_ref"
    assert (given["data.train_batch_size"], given[f"{actor}.rollout.n"]) == ("4", "2")
    assert (given["data.max_prompt_length"], given["data.max_response_length"]) == ("16", "8")
    assert (given[f"{actor}.actor.use_kl_loss"], given[f"{actor}.actor.kl_loss_coef"]) == ("True", "0.001")
    assert given[f"{actor}.model.use_remove_padding"] == "True"
    assert given[f"+{actor}.model.override_config.attn_implementation"] == "sdpa"
    assert given["trainer.total_training_steps"] == "2"
    assert int(given["ray_kwargs.ray_init.num_cpus"]) >= 24
    assert command[-2:] == ["trainer.use_v1=False", "data.seed=3"], "the last of two settings holds"

    given = settings_of(peers_verl.sft_command(args, Path("models"), Path("data"), "padded", batch=6))
    assert (given["data.train_batch_size"], given["data.max_length"], given["data.max_token_len_per_gpu"]) == (
        "6", "30", "256",
    )  # fmt: skip
    assert (given["model.use_remove_padding"], given["model.enable_gradient_checkpointing"]) == ("False", "False")


def test_upstream_finds_its_own_packages_and_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    environment = peers_verl.environment_of(parsed(folder=tmp_path), tmp_path)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), str(ROOT / "benchmarks" / "upstream")]


@pytest.mark.parametrize(
    ("device", "parts", "setting", "told", "stands_in"),
    [
        ("cuda", [], "sdpa", "sdpa", False),
        ("cuda", ["python"], "flash_attention_2", "flash_attention_2, kernels of PyTorch", True),
        ("cuda", ["python", "compiled"], "flash_attention_2", "flash_attention_2", False),
        # The kernels are a GPU's.
        ("cpu", ["python"], "sdpa", "sdpa", False),
    ],
)
def test_flash_attention_is_taken_as_far_as_it_is_there(tmp_path, device, parts, setting, told, stands_in):
    if "python" in parts:
        metadata = tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\n")
    if "compiled" in parts:
        (tmp_path / "flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so").touch()
    args = parsed("--device", device, folder=tmp_path)
    assert (peers_verl.attention(args), peers_verl.attention_told(args)) == (setting, told)
    assert f"+override_config.attn_implementation={setting}" in peers_verl.model_settings(args, "packed")
    folders = peers_verl.environment_of(args, tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert (str(ROOT / "benchmarks" / "upstream" / "attention") in folders) == stands_in


# ---- how it is read


def test_rows_by_hand():
    # Named at 10, 14, 17 and 19 s: the steps after the first took 4, 3 and 2 s.
    lines = [{"train/global_tokens": tokens, "train/loss": 1.0} for tokens in (50, 80, 90, 40)]
    row = peers_verl.sft_row(PeerRun(lines, [10.0, 14.0, 17.0, 19.0]), warmup=1)
    assert (row["seconds"], row["all_seconds"], row["tokens"]) == (3.0, [4.0, 3.0, 2.0], 70.0)
    assert row["tokens_per_s"] == 20.0  # the median of 80 / 4, 90 / 3 and 40 / 2
    assert peers_verl.sft_row(PeerRun(lines, [10.0, 14.0, 17.0, 19.0]), warmup=2)["all_seconds"] == [3.0, 2.0]

    def line(seconds: float, push: float) -> dict[str, float]:
        return {"timing_s/step": seconds, "timing_s/update_weights": push, "perf/total_num_tokens": 120}

    row = peers_verl.grpo_row(PeerRun([line(90.0, 9.0), line(8.0, 2.0), line(4.0, 1.0)], [0.0, 9.0, 14.0]), warmup=1)
    assert (row["seconds"], row["push"], row["push_share"]) == (6.0, 1.5, 0.25)
    assert (row["tokens"], row["tokens_per_s"]) == (120, 20.0)
    assert (row["all_seconds"], row["console_seconds"]) == ([8.0, 4.0], [9.0, 5.0])
    assert row["gen"] is None, "a time that upstream does not give"


def test_ours_is_compared_with_the_peers_best():
    rows = [
        {"task": "sft", "who": "ours", "tokens_per_s": 60.0},
        {"task": "sft", "who": "verl packed", "tokens_per_s": 20.0},
        {"task": "sft", "who": "verl padded", "tokens_per_s": 30.0},
        {"task": "grpo", "who": "ours", "tokens_per_s": 60.0},
        {"task": "grpo", "who": "verl packed", "tokens_per_s": None},
    ]
    report = peers.Report("peers", parsed(), peers.COLUMNS)
    report.rows = rows
    peers.compare(report)
    assert [row.get("times_peer") for row in rows] == [2.0, None, None, None, None]


def test_a_run_that_fails_says_so(tmp_path, capfd):
    args = parsed(folder=tmp_path)
    with pytest.raises(PeerError, match="ended with 3"):
        peers_verl.run(args, [sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path)
    assert "why" in capfd.readouterr().out
    with pytest.raises(PeerError, match="expected 2 steps, got metrics of 0 and 1 on the console"):
        peers_verl.run(args, [sys.executable, "-c", "print('step:1 - train/loss:1.0')"], tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "needs a folder with upstream verl unpacked, got none"),
        (["--peer-path", "{}"], "expected a folder with upstream verl, found none in it"),
    ],
)
def test_what_is_missing_is_said_before_work_starts(tmp_path, options, said):
    given = [one.format(tmp_path) for one in options]
    with pytest.raises(SystemExit, match=said):
        peers.main(["--shape", "tiny", "--device", "cpu", "--peer", "verl", *given])


def write_package(folder: Path, code: str = "") -> None:
    (folder / "verl-0.9.1.dist-info").mkdir()
    (folder / "verl-0.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\n")
    (folder / "verl").mkdir()
    (folder / "verl" / "__init__.py").write_text(code)


def test_upstream_that_cannot_be_imported_is_said_before_work_starts(tmp_path):
    write_package(tmp_path, r"raise ImportError('tokenizers<=0.23.0 is required, but found 0.23.2\nTry another')")
    with pytest.raises(SystemExit, match=r"cannot be imported \(1\):\n(.*\n)*.*found 0\.23\.2\nTry another"):
        peers.main(
            ["--shape", "tiny", "--device", "cpu", "--peer", "verl", "--peer-path", str(tmp_path), "--runs", "peer-sft"]
        )


def test_the_process_of_one_run_does_not_load_upstream_once_more(tmp_path, capfd):
    """It goes on to upstream's command, which fails."""
    write_package(tmp_path, "raise ImportError('none')")
    options = ["--peer-path", str(tmp_path), "--runs", "peer-sft", "--peer-rows", "packed", "--peer-checked"]
    with pytest.raises(SystemExit, match="these have failed, see above: verl sft, packed rows"):
        peers.main(["--shape", "tiny", "--device", "cpu", "--peer", "verl", *options])
    assert "to see whether upstream can be run" not in capfd.readouterr().out


def test_generation_needs_a_gpu(tmp_path):
    write_package(tmp_path)
    assert peers_verl.versions(tmp_path) == {"peer verl": "0.9.1"}
    with pytest.raises(SystemExit, match="on CPU pass --runs ours-sft peer-sft"):
        peers.main(["--shape", "tiny", "--device", "cpu", "--peer", "verl", "--peer-path", str(tmp_path)])


# ---- upstream itself


@with_upstream
@pytest.mark.e2e
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_upstreams_sft_trains_on_the_rows_that_ours_has(tmp_path, rows):
    args = parsed(folder=PEER_PATH)
    ours = sft_rows(args, 1)
    peers_verl.write_sft_rows(tmp_path / "sft.parquet", ours)
    with model_folder(SHAPES["tiny"], "cpu") as models:
        command = peers_verl.sft_command(args, models, tmp_path, rows, batch=len(ours))
        done = peers_verl.run(args, command, tmp_path)
    # The file is one batch, so every step has all of its tokens.
    assert [line["train/global_tokens"] for line in done.metrics] == [sum(ours.lengths())] * 2
    # A random model is near log 512 = 6.24.
    assert all(line["train/loss"] == pytest.approx(6.24, abs=0.1) for line in done.metrics)
    assert peers_verl.sft_row(done, warmup=1)["tokens_per_s"] > 0
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert written < 1e6, "no weights are saved"


@with_upstream
@pytest.mark.e2e
def test_upstream_knows_every_setting_of_the_grpo_run(tmp_path):
    args = parsed("--prompts", "4", "--n", "2", folder=PEER_PATH)
    peers_verl.write_prompts(tmp_path / "prompts.parquet", args)
    command = [*peers_verl.grpo_command(args, tmp_path, tmp_path, "packed"), "--cfg", "job", "--resolve"]
    environment = peers_verl.environment_of(args, tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in ("adv_estimator: grpo", "use_kl_loss: true", "attn_implementation: sdpa", "max_model_len: 24"):
        assert line in done.stdout


@with_upstream
@pytest.mark.e2e
def test_both_stand_in_one_report(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--shape", "tiny", "--device", "cpu", "--out", str(out)]
    options = ["--peer", "verl", "--peer-path", PEER_PATH, "--peer-rows", "packed", "--peer-tokens", "256"]
    counts = ["--runs", "ours-sft", "peer-sft", "--warmup", "1", "--steps", "1"]
    done = subprocess.run([*command, *options, *counts], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    written = json.loads(out.read_text())
    ours, theirs = written["results"]
    assert (ours["who"], theirs["who"], theirs["attention"]) == ("ours", "verl packed", "sdpa")
    assert ours["times_peer"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
    assert written["versions"]["peer verl"] != written["versions"]["vllm"]
