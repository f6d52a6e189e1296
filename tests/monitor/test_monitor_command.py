"""`python -m verl.monitor`: what it reads, prints, draws and ends with."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.monitor.bad_runs import BAD_RUNS, healthy_rows
from verl.monitor.__main__ import main
from verl.monitor.reading import NotARun, read_run
from verl.utils.step_line import step_line

SICK, WELL = BAD_RUNS["too strong"].rows, healthy_rows(30, seed=1)
VERDICT = "Unhealthy at step 39: the discriminator is too strong"
STEPS = dict(SICK)


def write_jsonl(path: Path, rows, text=lambda step, data: json.dumps({"step": step, "data": data})) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(text(step, data) + "\n" for step, data in rows), encoding="utf-8")
    return path


def table(rows, step_name: str) -> list[dict[str, object]]:
    return [{step_name: step, **data} for step, data in rows]


def write_csv(path: Path, rows, name=lambda metric: metric, step_name="_step", extremes=False) -> Path:
    columns = [step_name]
    for metric in STEPS[0]:
        columns += [name(metric), *([f"{name(metric)}__MIN", f"{name(metric)}__MAX"] if extremes else [])]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        lines = csv.DictWriter(file, columns, restval="")
        lines.writeheader()
        for step, data in rows:
            named = {name(metric): value for metric, value in data.items() if name(metric) in columns}
            if extremes:
                named |= {f"{column}__{end}": -1e9 for column in named for end in ("MIN", "MAX")}
            lines.writerow({step_name: step, **named})
    return path


def write_tensorboard(folder: Path, rows) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for step, data in rows:
            for metric, value in data.items():
                writer.add_scalar(metric, value, step)
    return folder


def as_columns(rows, step_name="_step"):
    lines = table(rows, step_name)
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: {str(row): line[name] for row, line in enumerate(lines) if name in line} for name in names}


FORMS = {
    "a run's folder": lambda folder, rows: write_jsonl(folder / "run" / "metrics.jsonl", rows).parent,
    "the only run below": lambda folder, rows: write_jsonl(folder / "gad" / "x" / "metrics.jsonl", rows).parents[2],
    "tensorboard": lambda folder, rows: write_tensorboard(folder / "tb", rows),
    "a run with tensorboard alone": lambda folder, rows: write_tensorboard(folder / "tensorboard", rows).parent,
    "jsonl, flat": lambda folder, rows: write_jsonl(
        folder / "flat.jsonl", rows, lambda step, data: json.dumps({"_step": step, "_runtime": 3.0, **data})
    ),
    "json, rows": lambda folder, rows: _json(folder, table(rows, "_step")),
    "json, columns": lambda folder, rows: _json(folder, as_columns(rows)),
    "json, a history": lambda folder, rows: _json(folder, {"name": "x", "history": table(rows, "global_step")}),
    "csv, a history": lambda folder, rows: write_csv(folder / "h.csv", rows),
    "csv, charts": lambda folder, rows: write_csv(
        folder / "c.csv", rows, lambda metric: f"my - run - {metric}", "Step", extremes=True
    ),
}


FORMS |= {
    "hugging face": lambda folder, rows: _json(folder, {"log_history": table(rows, "step"), "epoch": 2.0}),
    "jsonl, several rows a step": lambda folder, rows: write_jsonl(
        folder / "rows.jsonl",
        [(step, {name: value}) for step, data in rows for name, value in data.items()],
        lambda step, data: json.dumps({"_step": step, **data}),
    ),
    "upstream's console": lambda folder, rows: write_jsonl(
        folder / "main.log",
        rows,
        lambda step, data: (
            "Training Progress:  1%\n(TaskRunner pid=12) "
            + " - ".join([f"step:{step}", *(f"{name}:np.float64({value!r})" for name, value in data.items())])
        ),
    ),
}


def _json(folder: Path, content) -> Path:
    (folder / "history.json").write_text(json.dumps(content))
    return folder / "history.json"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(form, tmp_path, capsys):
    path = FORMS[form](tmp_path, SICK)
    run = read_run(path)
    assert sorted(run.steps) == list(range(40))
    assert run.series("critic/d_acc").values == pytest.approx([data["critic/d_acc"] for _, data in SICK], rel=1e-6)
    assert main([str(path)]) == 1
    assert capsys.readouterr().out.startswith(VERDICT)


def test_a_healthy_run_ends_with_0_and_a_sick_one_with_1_in_a_process(tmp_path):
    def ends(*arguments):
        done = subprocess.run([sys.executable, "-m", "verl.monitor", *map(str, arguments)], capture_output=True)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    well = write_jsonl(tmp_path / "well" / "metrics.jsonl", WELL)
    code, said, _ = ends(well.parent)
    assert code == 0 and said.splitlines() == ["Healthy: 30 steps of GAD, no alarm."]
    sick = write_jsonl(tmp_path / "sick.jsonl", SICK)
    code, said, _ = ends(sick, "--lang", "zh")
    assert code == 1 and said.startswith("不健康（第 39 步）：判别器过强")
    code, said, error = ends(tmp_path / "none")
    assert (code, said) == (2, "") and "expected a run's folder or a file of metrics, got nothing there" in error
    assert ends(tmp_path, "--no-such-flag")[0] == 2


def test_settings_beside_a_run_are_the_present_values(tmp_path, capsys):
    file = write_jsonl(tmp_path / "metrics.jsonl", SICK)
    main([str(tmp_path)])
    assert "Turn critic.optim.lr: lower it" in capsys.readouterr().out
    (tmp_path / "settings.json").write_text(json.dumps({"critic": {"optim": {"lr": 5e-6}}}))
    main([str(tmp_path)])
    assert "Turn critic.optim.lr (now 5e-06): lower it" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("critic.optim.lr: 0.25\n")
    main([str(file), "--settings", str(tmp_path / "mine.yaml")])
    assert "(now 0.25)" in capsys.readouterr().out
    (tmp_path / "settings.json").write_text("{")
    assert main([str(tmp_path)]) == 1, "a broken one of the run's own is no reason to say nothing"
    capsys.readouterr()
    assert main([str(tmp_path), "--settings", str(tmp_path / "settings.json")]) == 2
    assert "expected settings as YAML or JSON" in capsys.readouterr().err


def test_logs_as_they_are_left(tmp_path):
    """A last line that a crash cut, steps made again, nan as text, texts and tables among the numbers, a BOM."""
    lines = [
        '\ufeff{"step": 0, "data": {"critic/d_acc": 0.5}}',
        '{"step": 1, "data": {"critic/d_acc": 0.9, "val/x": 1}}',
        '{"step": 1, "data": {"critic/d_acc": 0.6, "critic/d_loss": "nan", "text": "abc", "list": [1], "no": null}}',
        "",
        '{"step": 2, "data": {"critic/d_a',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.series("critic/d_acc").values == [0.5, 0.6] and run.series("val/x").steps == [1]
    assert math.isnan(run.series("critic/d_loss").values[0])
    assert run.metrics == {"critic/d_acc", "critic/d_loss", "val/x"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "not json\n{}\n", "expected a JSON object a line, got 'not json' in line 1"),
        ("a.jsonl", "[1]\n[2]\n", "expected rows of metrics by name, got '[1]'"),
        ("a.jsonl", "", "expected metrics by step, got no number"),
        ("a.json", "{", "expected JSON, got"),
        ("a.json", "3", "expected a list of rows or a table of columns, got int"),
        ("a.csv", "Step,a - x,a - x__MIN,b - x,b - x__MIN\n0,1,1,1,1\n", "expected one run, got columns of 2 (a, b)"),
        ("a.dat", "x", "expected a name in .jsonl, .ndjson, .json, .csv, .log, .txt, got .dat"),
        ("a.log", "no steps\n", "expected metrics by step, got no number"),
        ("events.out.tfevents.1.host", "x", "expected a folder for TensorBoard's files, got one of them"),
    ],
)
def test_what_is_no_run_is_refused(name, content, expected, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_folders_and_encodings_that_are_no_run(tmp_path, capsys):
    with pytest.raises(NotARun, match=r"expected metrics.jsonl or TensorBoard's files, got neither"):
        read_run(tmp_path)
    (tmp_path / "gbk.csv").write_bytes("step,准确率\n0,1\n".encode("gbk"))
    with pytest.raises(NotARun, match="expected UTF-8"):
        read_run(tmp_path / "gbk.csv")
    for name in "ab":
        write_jsonl(tmp_path / name / "metrics.jsonl", SICK)
    with pytest.raises(NotARun, match="expected one run, got 2; pass one of"):
        read_run(tmp_path)


def test_nothing_that_could_be_judged_is_not_called_healthy(tmp_path, capsys):
    path = write_jsonl(tmp_path / "metrics.jsonl", [(step, {"my/metric": 1.0}) for step in range(50)])
    assert main([str(path)]) == 2
    assert capsys.readouterr().out.startswith("Cannot say: 50 steps")


def test_rules_of_ones_own_and_their_faults(tmp_path, capsys):
    path = write_jsonl(tmp_path / "metrics.jsonl", SICK)
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n- {id: discriminator_too_strong, enabled: false}\n")
    assert main([str(path), "--rules", str(rules)]) == 0
    rules.write_text("rules:\n- {id: discriminator_too_strong, for: soon}\n")
    capsys.readouterr()
    assert main([str(path), "--rules", str(rules)]) == 2
    assert "for: expected a whole number from 1 to 1000, got 'soon'; fix" in capsys.readouterr().err
    assert main(["--list", "--lang", "zh"]) == 0
    assert "| 规则 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "训练-第$1$次"])
def test_the_picture(name, tmp_path, capsys):
    path = write_jsonl(tmp_path / name / "metrics.jsonl", SICK).parent
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of characters that no font has
        assert main([str(path), "--plot"]) == 1
    picture = path / "training_progress.png"
    assert capsys.readouterr().out.rstrip().endswith(str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 30_000
    named = tmp_path / "of_tensorboard.png"
    assert main([str(write_tensorboard(tmp_path / "tb", WELL)), "--plot", str(named)]) == 0
    assert named.is_file()


def test_a_picture_that_cannot_be_is_an_error_in_a_sentence(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "metrics.jsonl", SICK)
    assert main([str(path), "--plot", str(tmp_path / "none" / "a.png")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", [(0, {"my/metric": 1.0})])
    assert main([str(other), "--plot"]) == 2
    assert "--plot: expected metrics" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("verl.monitor.figure.find_spec", lambda name: None)
    assert main([str(path), "--plot"]) == 2
    output = capsys.readouterr()
    assert "expected matplotlib to be installed, got no such package; pip install matplotlib" in output.err
    assert output.out == "", "said before anything else"


def test_a_terminal_that_has_no_chinese(tmp_path):
    path = write_jsonl(tmp_path / "metrics.jsonl", SICK)
    done = subprocess.run(
        [sys.executable, "-m", "verl.monitor", str(path), "--lang", "zh"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1 and b"critic.optim.lr" in done.stdout


def test_what_the_trainer_has_shown_on_the_console(tmp_path, capsys):
    lines = [f"10:00:00 begun ...\n{step_line(step, 40, data)}\n" for step, data in BAD_RUNS["too strong"].rows]
    (tmp_path / "train.log").write_text("".join(lines) + "validation at step 40: rouge-L 0.241, d_acc 1.000\n")
    assert main([str(tmp_path / "train.log")]) == 1
    assert capsys.readouterr().out.startswith("Unhealthy at step 40: the discriminator is too strong")
