"""A whole pipeline with the tiny model: SeqKD, judged; then a stage more, for which SeqKD is not made again."""

from __future__ import annotations

import json

import pytest

from verl.pipeline import main

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@pytest.fixture(scope="module")
def start(folder):
    """`start(*more)`: the pipeline in this process, its stages in their own; returns the exit code."""
    with (folder / "held_out.jsonl").open("w") as file:
        for row in range(6):
            content = [{"role": "user", "content": f"b{row}!"}]
            file.write(json.dumps({"content": content, "teacher_response": f"It is {row}."}) + "\n")

    def run(*more):
        return main(
            ["--model", str(folder / "base"), "--data", str(folder / "train.jsonl"), "--val",
             str(folder / "held_out.jsonl"), "--exp_name", "it", "--out", str(folder / "it"), "trainer.device=cpu",
             "data.train_batch_size=4", "data.max_prompt_length=28", "data.max_response_length=10",
             "trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.val_before_train=False",
             "trainer.logger=[file]", *more]
        )  # fmt: skip

    return run


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """The test session's log stays as it is."""
    monkeypatch.setattr("verl.utils.run_log.log_to_terminal", lambda: None)
    monkeypatch.setenv("N_GPUS_PER_NODE", "1")


def test_a_dry_run_shows_all_stages_and_writes_nothing(start, folder, capsys):
    assert start("--dry_run", "--stages", "seqkd,warmup,gad", "gad.critic.optim.lr=1e-4") == 0
    said = capsys.readouterr().out
    assert "[1/3] seqkd: 2 steps (18 rows in batches of 4)" in said and "no problem was found" in said
    assert "student: what warmup hands on" in said and "discriminator: what warmup hands on" in said
    assert "critic.optim.lr=1e-4" in said.split("[3/3]")[1] and "critic.optim.lr=1e-4" not in said.split("[3/3]")[0]
    assert not (folder / "it").exists()


def test_a_dry_run_finds_every_problem_of_all_stages(start, folder, capsys):
    (folder / "bad.jsonl").write_text('{"content": [{"role": "user", "content": "a0?"}]}\n')
    code = start(
        "--dry_run", "--stages", "seqkd,gad", "--data", str(folder / "bad.jsonl"), "gad.trainer.totl_epochs=1",
        "critic.optim.lrr=1", "trainer.logger=[wandb]", "seqkd.trainer.project_name=a/../b",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 2
    assert "gad: unknown key trainer.totl_epochs; did you mean trainer.total_epochs?" in said
    assert "unknown key critic.optim.lrr" in said and "seqkd: trainer.project_name='a/../b' is no name" in said

    assert start("--dry_run", "--stages", "seqkd,gad", "--data", str(folder / "bad.jsonl")) == 2
    said = capsys.readouterr().out
    assert "seqkd, gad: " in said and "there is no column 'teacher_response'" in said
    assert "gad: nothing has taught the discriminator" in said


def test_prompts_that_were_trained_on_are_not_judged_on(start, folder, capsys):
    assert start("--dry_run", "--val", str(folder / "train.jsonl")) == 2
    assert "judge: expected prompts that no student was trained on" in capsys.readouterr().out
    assert start("--dry_run", "--val", str(folder / "train.jsonl"), "--no_judge") == 0


def test_a_stage_more_on_what_is_there(start, folder, capfd):
    out = folder / "it"
    assert start() == 0
    said = capfd.readouterr().out
    assert "[1/1] seqkd: 2 steps" in said and "by ROUGE-L" in said and "next:" in said
    assert "a report of it" not in said and "the next stage" not in said
    assert (out / "students" / "seqkd" / "model.safetensors").is_file() and (out / "report.html").is_file()
    assert set(json.loads((out / "judge/at_0.8/judge.json").read_text())["students"]) == {"base", "seqkd"}
    before = (out / "students" / "seqkd" / "model.safetensors").stat().st_mtime_ns

    assert start("--stages", "seqkd,soda") == 0
    said = capfd.readouterr().out
    assert "[1/2] seqkd: done, 2 steps" in said and "[2/2] soda: 2 steps" in said
    assert f"student {out}/seqkd/global_step_2/actor" in said
    assert (out / "students" / "seqkd" / "model.safetensors").stat().st_mtime_ns == before
    assert set(json.loads((out / "judge/at_0.8/judge.json").read_text())["students"]) == {"base", "seqkd", "soda"}

    judged = (out / "judge/at_0.8/judge.json").stat().st_mtime_ns
    assert start("--stages", "seqkd,soda", "--judge_memory", "0.5") == 0
    assert (out / "judge/at_0.8/judge.json").stat().st_mtime_ns == judged
    capfd.readouterr()

    assert start("--stages", "seqkd,soda", "seqkd.actor_rollout_ref.actor.optim.lr=1e-4") == 2
    said = capfd.readouterr().err
    assert "is finished, and was made otherwise: actor_rollout_ref.actor.optim.lr=5e-06, now 0.0001" in said
    assert f"move {out}/seqkd away" in said
