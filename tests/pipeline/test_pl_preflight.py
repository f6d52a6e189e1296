"""Folders that a pipeline cannot work in, seen before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.other_tokenizer import other_tokenizer, write_other_model
from tests.tiny import write_data, write_model
from verl.pipeline import main
from verl.pipeline.state import State
from verl.utils.run_lock import only_run_in


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base model with data to train and to judge on."""
    path = tmp_path_factory.mktemp("preflight")
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=8)
    content = [{"role": "user", "content": "b!"}]
    (path / "val.jsonl").write_text(json.dumps({"content": content, "teacher_response": "It is."}) + "\n")
    return path


@pytest.fixture
def line(made, tmp_path):
    """The pipeline's command line, in `tmp_path / "it"`."""
    files = ["--model", f"{made}/base", "--data", f"{made}/train.jsonl", "--val", f"{made}/val.jsonl"]
    settings = [
        "trainer.device=cpu",
        "data.train_batch_size=4",
        "data.max_prompt_length=28",
        "data.max_response_length=10",
    ]
    return [*files, "--exp_name", "it", "--out", str(tmp_path / "it"), *settings]


@pytest.fixture
def start(line, monkeypatch):
    """`start(*more)`: the pipeline in this process; returns the exit code."""
    monkeypatch.setattr("verl.utils.run_log.log_to_terminal", lambda: None)
    return lambda *more: main([*line, *more])


def checkpoint(run, step):
    (run / f"global_step_{step}").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_stage_without_the_one_it_began_with(start, tmp_path, capsys):
    checkpoint(tmp_path / "it" / "warmup", 2)
    assert start("--stages", "seqkd,warmup") == 2
    said = capsys.readouterr().err
    assert f"warmup: began with what an earlier seqkd handed on, and {tmp_path}/it/seqkd holds no checkpoint" in said
    assert not (tmp_path / "it" / "seqkd").exists()


def test_a_stage_that_asks_for_other_adapters_than_those_it_is_handed(start, capsys):
    student = ("actor_rollout_ref.model.lora_rank=4", "gad.actor_rollout_ref.model.target_modules=[q_proj]")
    critic = (
        "warmup.critic.model.lora_rank=2",
        "gad.critic.model.lora_rank=3",
        "gad.critic.model.target_modules=[q_proj]",
    )
    for given, said in (
        (student, "goes on with the adapters of warmup, and actor_rollout_ref.model asks for others (target_modules=["),
        (("seqkd.actor_rollout_ref.model.lora_rank=4", "gad.actor_rollout_ref.model.lora_rank=8"),
         "goes on with the adapters of seqkd, and actor_rollout_ref.model asks for others (lora_rank=8, not 4): give"),
        ((student[0], *critic), "adapters of warmup, and critic.model asks for others (lora_rank=3, not 2; target_m"),
    ):  # fmt: skip
        assert start("--stages", "seqkd,warmup,gad", "--dry_run", *given) == 2
        (problem,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
        assert problem.startswith("  - gad: ") and said in problem
    assert start("--stages", "seqkd,warmup,gad", "--dry_run", student[0], "critic.model.lora_rank=2") == 0


def test_two_pipelines_in_one_folder_are_one_too_many(start, tmp_path, capsys):
    with only_run_in(tmp_path / "it"):
        assert start() == 2
    assert "another run is at work in" in capsys.readouterr().err


def test_a_single_runs_folder_is_none_for_a_pipeline(start, tmp_path, capsys):
    checkpoint(tmp_path / "it", 2)
    assert start() == 2
    assert "holds the checkpoints of a single run" in capsys.readouterr().err


def test_every_file_that_is_missing_is_named_by_its_flag(start, made, tmp_path, capsys):
    """Whatever else is wrong: the base, one of two files to train on, both to validate on, a setting."""
    more = ["--model", "no_base", "--data", f"{tmp_path}/more.jsonl", "--val", "v.jsonl", "--val", "w.parquet"]
    assert start(*more, "--dry_run", "data.no_such=1") == 2
    said = capsys.readouterr().out
    problems = [line for line in said.splitlines() if line.startswith("  - ")]
    for flag, file in (("--data", f"{tmp_path}/more.jsonl"), ("--val", "v.jsonl"), ("--val", "w.parquet")):
        assert [file in problem for problem in problems].count(True) == 1
        assert any(p.startswith(f"  - {flag}: no such data file") and p.endswith(file) for p in problems)
    assert any("data.no_such" in problem for problem in problems)
    assert start(*more, "--dry_run", "--stages", "seqkd,warmup") == 2
    said = capsys.readouterr().out
    assert "seqkd, warmup: model folder" in said and "name of the Hugging Face hub" in said
    assert said.count("no such data file") == 3
    assert "how much is needed is not known" in said and "disk not known" in said


def test_rows_beyond_the_context_are_told_once_with_what_tells_the_lengths(start, made, capsys):
    """256 positions; 250 + 10 are too many. Rows can be read all the same: eight, in batches of four."""
    more = ("data.max_prompt_length=250", "seqkd.trainer.total_epochs=3", "warmup.trainer.total_epochs=2")
    assert start("--dry_run", "--stages", "seqkd,warmup", *more) == 2
    said = capsys.readouterr().out
    assert "[1/2] seqkd: 6 steps (8 rows in batches of 4)" in said and "[2/2] warmup: 4 steps" in said
    (problem,) = [line for line in said.splitlines() if line.startswith("  - ")]
    assert problem.startswith("  - seqkd, warmup: actor_rollout_ref.model.path=")
    assert "data.max_prompt_length + data.max_response_length = 260 is above max_position_embeddings=256" in problem
    assert problem.endswith(f"verl.data_tools.lengths --data {made}/train.jsonl --model {made}/base")
    assert "how much is needed is not known" in said


def test_problems_of_the_command_line_start_nothing(start, tmp_path, capsys):
    assert start("actor_rollout_ref.model.path=/m", "seqkd.trainer.totl_epochs=2") == 2
    out, said = capsys.readouterr()
    assert "error: settings: actor_rollout_ref.model.path=/m: the pipeline decides" in said
    assert "goes on from here" not in out + said
    assert State(tmp_path / "it").finished("seqkd") is None


def test_what_a_discriminator_of_another_family_cannot_read(start, tmp_path, capsys):
    write_other_model(tmp_path / "strict", other_tokenizer("{{ raise_exception('no such turn') }}"))
    assert start("--stages", "seqkd,warmup", "--reward_model", f"{tmp_path}/strict") == 2
    said = capsys.readouterr().err
    assert "warmup: 8 of 8 rows cannot be read by the discriminator" in said and "no such turn" in said
    assert not (tmp_path / "it" / "seqkd").exists()


def test_a_judge_that_could_not_start_is_known_before_anything_is_trained(line, tmp_path):
    """In a process of its own: what has been imported in this one would stay."""
    code = "import sys; sys.modules['tenacity'] = None; from verl.pipeline import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *line, "--stages", "seqkd"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "judge: it does not start here" in done.stderr and "tenacity" in done.stderr and "--no_judge" in done.stderr
    assert not (tmp_path / "it" / "seqkd").exists()
