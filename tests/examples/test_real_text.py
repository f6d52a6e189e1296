"""The real-text experiment's plan, split, queue and table; its training is the trainer's own."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest

from examples.real_text.plan import ANSWERS, BY_NAME, COMMON, RUNS, TEMPERATURES
from examples.real_text.report import render
from examples.real_text.run import VAL_ROWS, Job, answers_of, needed, split, work_through
from examples.real_text.train import train_and_answer
from examples.real_text.words import accuracy
from tests.tiny import write_data, write_model
from verl.trainer.config import compose_config


@pytest.mark.parametrize("name", BY_NAME)
def test_every_run_composes_and_comes_after_its_start(name):
    run = BY_NAME[name]
    required = ["data.train_files=x", "data.val_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    config = compose_config([*COMMON, *run.overrides, *required])
    assert config.use_critic == name.startswith(("GAD", "earlier")) and config.soda.enable == name.startswith("SODA")
    assert (run.epochs is None) != (run.steps is None)
    before = [other.name for other in RUNS[: RUNS.index(run)]]
    assert run.parent is None or run.parent in before


def test_a_run_brings_what_it_starts_from():
    assert [run.name for run in needed(["SODA"])] == ["SeqKD", "SODA"]
    assert [run.name for run in needed(["GAD-from-2-*"])] == ["SeqKD-2-epochs", "GAD-from-2-epochs"]


def rows(start: int, stop: int) -> pd.DataFrame:
    contents = [[{"role": "user", "content": f"prompt {number}"}] for number in range(start, stop)]
    return pd.DataFrame({"content": contents, "teacher_response": [f"answer {n}" for n in range(start, stop)]})


def test_no_prompt_is_on_two_sides_of_the_split(tmp_path):
    train = pd.concat([rows(0, 400), rows(0, 3)])  # three prompts twice
    train.to_parquet(tmp_path / "train.parquet")
    rows(395, 420).to_parquet(tmp_path / "test.parquet")  # five of them are for training
    split(tmp_path / "train.parquet", tmp_path / "test.parquet", 100, tmp_path / "data")
    parts = {name: pd.read_parquet(tmp_path / "data" / f"{name}.parquet") for name in ("train", "val", "judge")}
    prompts = {name: {row[0]["content"] for row in part["content"]} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 400 - 100 - VAL_ROWS,
        "val": VAL_ROWS,
        "judge": 100 + 20,
    }
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 420
    with pytest.raises(SystemExit, match="400 different prompts: too few to put 200 aside"):
        split(tmp_path / "train.parquet", tmp_path / "test.parquet", 200, tmp_path / "other")


def test_jobs_run_after_what_they_need_and_failures_are_tried_again(tmp_path, capsys):
    def job(name: str, code: str, *needs: str) -> Job:
        command = [sys.executable, "-c", code.format(out=tmp_path)]
        return Job(name, set(needs), command, tmp_path / f"{name}.log", (tmp_path / f"{name}.done").exists)

    after = "import os; assert os.path.exists('{out}/first.done'); open('{out}/second.done', 'w')"
    once = (
        "import os; t = '{out}/tried'; tried = os.path.exists(t); open(t, 'w')\n"
        "assert tried, 'the first time'\nopen('{out}/flaky.done', 'w')"
    )
    jobs = [
        job("second", after, "first"),
        job("first", "open('{out}/first.done', 'w')"),
        job("flaky", once),
        job("broken", "raise SystemExit(3)"),
        job("lost", "open('{out}/lost.done', 'w')", "broken"),
    ]
    assert work_through(jobs, ["", ""], 1, tries=2) == ["broken", "lost"]
    assert not (tmp_path / "lost.done").exists() and (tmp_path / "second.done").exists()
    assert "the first time" in (tmp_path / "flaky.log").read_text()
    printed = capsys.readouterr().out
    assert printed.count("broken: FAILED (once more)") == printed.count("broken: FAILED (for good)") == 1
    # What is done is not done again.
    assert work_through(jobs[:3], [""], 1, tries=1) == [] and "done" not in capsys.readouterr().out


def test_the_table_averages_over_seeds(tmp_path):
    for seed, told in (("1", 0.6), ("2", 0.7)):
        home = tmp_path / f"seed{seed}"
        folder = home / "judge" / "GAD@8@0.8"
        folder.mkdir(parents=True)
        numbers = {"rouge_l": 0.4, "mean_tokens": 90.0, "length_ratio": 0.9, "cut": 0.01, "loops": 0.0}
        test = {"accuracy": {"value": told}, "lengths_within_0.2": {"value": 0.55}}
        student = {"numbers": {**numbers, "distinct": [0.1, 0.5, 0.6, 0.7]}, "two_sample": test}
        (folder / "judge.json").write_text(json.dumps({"students": {"GAD": student}}))
        (home / "GAD").mkdir()
        pd.DataFrame({"seconds": [30.0]}).to_parquet(home / "GAD" / "answers-8-at-0.8.parquet")
        lines = [json.dumps({"step": step, "data": {"critic/d_acc": step / 10}}) for step in range(10)]
        (home / "GAD" / "metrics.jsonl").write_text("\n".join(lines))
    (row,) = [line for line in render(tmp_path).splitlines() if line.startswith("| GAD")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Standard deviation of .6 and .7: .1 / sqrt(2). Steps 6 and 7 are the last quarter of the eight.
    assert cells[:7] == ["GAD", "8", "0.8", "2", "30", f"0.650 ± {0.1 / np.sqrt(2):.3f}", "0.550"]
    assert cells[13] == "0.650"


def test_the_judge_of_words_sees_what_is_there_and_nothing_else():
    draw = np.random.default_rng(0)
    prompts = [f"prompt {number // 2}" for number in range(400)]

    def texts(words: list[str]) -> list[str]:
        return [" ".join(draw.choice(words, size=12)) for _ in prompts]

    common = ["the", "house", "红", "色", "is", "big", "today", "."]
    # 200 prompts with two pairs each: a coin's share has a standard error of .025; cross-validation widens it.
    share, error = accuracy(prompts, texts(common), texts(common))
    assert share == pytest.approx(0.5, abs=0.1) and error == pytest.approx(0.025, abs=0.01)
    assert accuracy(prompts, texts(common), texts([*common, "indeed"]))[0] > 0.7
    assert accuracy(prompts[:20], ["a b"] * 20, ["a b"] * 20) == (0.5, 0)


def test_an_answer_learned_by_heart_from_another_pair_of_its_prompt_tells_the_judge_of_words_nothing():
    # Each prompt's teacher has words of its own, the same in both of its pairs; a judge that met one of the two while
    # it was trained would know the other.
    draw = np.random.default_rng(0)
    prompts = [f"prompt {number // 2}" for number in range(200)]
    teachers = [" ".join(f"{word}{number // 2}" for word in "abcdef") for number in range(200)]
    students = [" ".join(f"w{draw.integers(10**6)}" for _ in range(6)) for _ in prompts]
    assert accuracy(prompts, teachers, students)[0] == pytest.approx(0.5, abs=0.15)


def test_the_answers_of_the_last_step_at_every_temperature(tmp_path):
    (tmp_path / "GAD").mkdir()
    for name in ("answers-9-at-0.8", "answers-10-at-1.0", "answers-10-at-0.8"):
        (tmp_path / "GAD" / f"{name}.parquet").touch()
    last = [file.stem for file in answers_of(tmp_path, BY_NAME["GAD"], "last")]
    assert last == ["answers-10-at-0.8", "answers-10-at-1.0"]
    assert len(answers_of(tmp_path, BY_NAME["GAD"], "all")) == 3


def test_runs_train_and_answer(tmp_path):
    """SeqKD, and GAD from its end, on a tiny model: answers at both temperatures, GAD's with scores."""
    model, data, out = write_model(tmp_path / "base"), tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name, rows in (("train", 12), ("val", 3), ("judge", 5)):
        pd.read_json(write_data(tmp_path / f"{name}.jsonl", rows), lines=True).to_parquet(data / f"{name}.parquet")
    sizes = ["data.train_batch_size=4", "data.max_prompt_length=28", "data.max_response_length=10"]
    train_and_answer("SeqKD", data, out, model, 1, [*sizes, "trainer.total_training_steps=2"], float("inf"))
    short = ["actor_rollout_ref.rollout.n=2", "trainer.critic_warmup=1", "trainer.total_training_steps=2"]
    train_and_answer("GAD-ranking", data, out, model, 1, [*sizes, *short], float("inf"))
    for name, last in (("SeqKD", 2), ("GAD-ranking", 2)):
        assert (out / name / "done").exists()
        for temperature in TEMPERATURES:
            answers = pd.read_parquet(out / name / f"answers-{last}-at-{temperature}.parquet")
            assert len(answers) == 5 * ANSWERS and answers["content"].iloc[0] == answers["content"].iloc[ANSWERS - 1]
            assert set(answers["finish_reason"]) <= {"stop", "length"} and (answers["tokens"] > 0).all()
            assert ("score" in answers) == (name != "SeqKD")
    assert np.isfinite(answers["score"]).all()
