"""Which student is closest: the judge's numbers, made up here, in words."""

from __future__ import annotations

import pytest

from verl.pipeline import summary
from verl.pipeline.options import parse_options
from verl.pipeline.summary import NONE_CLOSER, closest, conclude


def report(students, interval=0.02):
    """{name: (ROUGE-L, accuracy or None)} as judge.json has it."""
    entries = {}
    for name, (rouge, accuracy) in students.items():
        entries[name] = {"numbers": {"rouge_l": rouge, "mean_tokens": 10.0, "cut": 0.0, "loops": 0.0}}
        if accuracy is not None:
            low_high = {"low": accuracy - interval, "high": accuracy + interval}
            entries[name]["two_sample"] = {"accuracy": {"value": accuracy, **low_high}}
    teacher = {"numbers": {"mean_tokens": 11.0, "cut": 0.0, "loops": 0.0}}
    return {"students": entries, "teacher": teacher}


def test_the_temperature_is_part_of_the_answer():
    """docs/where_to_stop.md: at 1 GAD is closer, and SeqKD at .8 is closer than both."""
    reports = {
        0.8: report({"base": (0.2, 0.95), "seqkd": (0.4, 0.57), "gad": (0.3, 0.62)}),
        1.0: report({"base": (0.2, 0.97), "seqkd": (0.4, 0.66), "gad": (0.3, 0.62)}),
    }
    best, says = closest(reports, ["seqkd", "gad"])
    assert best == "seqkd"
    assert says == (
        "seqkd, sampled at temperature 0.8: told from it in 0.570 [0.550, 0.590] of cases, where 0.5 is a perfect "
        "student"
    )


def test_what_is_too_close_is_named():
    best, says = closest({1.0: report({"base": (0, 0.9), "seqkd": (0, 0.61), "gad": (0, 0.6)})}, ["seqkd", "gad"])
    assert best == "gad" and says.endswith("too close to call against seqkd at 1")


def test_a_judge_that_cannot_tell_even_the_base_has_learned_nothing():
    students = {"base": (0, 0.55), "seqkd": (0, 0.51)}
    _, says = closest({0.8: report(students, 0.1), 1.0: report(students, 0.2)}, ["seqkd"])
    assert says.startswith("not decided: fresh discriminators could not tell even the base model")
    # Where it tells the base at one temperature, it has learned something.
    _, says = closest({0.8: report(students, 0.01), 1.0: report(students, 0.2)}, ["seqkd"])
    assert says.startswith("seqkd, sampled at temperature")


@pytest.mark.parametrize(("seqkd", "end"), [(0.9, "in 0.900 [0.880, 0.920]"), (0.61, ": too close to call")])
def test_a_base_that_no_student_is_closer_than(seqkd, end):
    best, says = closest({1.0: report({"base": (0, 0.6), "seqkd": (0, seqkd)})}, ["seqkd"])
    assert best is None and says.endswith(end)
    assert says.startswith(
        "no student is closer to the teacher than the base model, which is told in 0.600 [0.580, 0.620] of cases, and "
    )


@pytest.mark.parametrize(
    ("scores", "best", "says"),
    [
        ({"base": 0.1, "seqkd": 0.3, "soda": 0.2}, "seqkd", "seqkd by ROUGE-L alone (0.300 at temperature 0.8)"),
        ({"base": 0.4, "seqkd": 0.3, "soda": 0.2}, None, f"{NONE_CLOSER}, by ROUGE-L alone: 0.400, and 0.300 of seqkd"),
    ],
)
def test_numbers_alone_are_a_hint(scores, best, says):
    found = closest({0.8: report({name: (score, None) for name, score in scores.items()})}, ["seqkd", "soda"])
    assert found[0] == best and found[1].startswith(says)


def test_an_accuracy_that_could_not_be_told_is_left_out(tmp_path):
    reports = {0.8: report({"base": (0.1, 0.9), "seqkd": (0.2, 0.7)})}
    reports[0.8]["students"]["base"]["two_sample"]["accuracy"] = dict.fromkeys(("value", "low", "high"))
    text = concluded(tmp_path, reports)
    rows = {line.split()[0]: line for line in text.splitlines() if " at 0.8 " in line}
    assert rows["base"].split()[3] == "-" and "0.700 [0.680, 0.720]" in rows["seqkd"]


def concluded(out, reports):
    flags = ["--model", "m", "--data", "t", "--val", "v", "--exp_name", "x", "--out", str(out)]
    return conclude(parse_options(flags), {"seqkd": out / "students" / "seqkd"}, {}, reports, {"seqkd": "Healthy"})


def test_what_comes_next(tmp_path, monkeypatch):
    better = {0.8: report({"base": (0.1, 0.9), "seqkd": (0.2, 0.7)})}
    for found, command in ((object(), "vllm serve"), (None, "python -m verl.tools.chat")):
        monkeypatch.setattr(summary, "find_spec", lambda name, found=found: found)
        text = concluded(tmp_path, better)
        assert f"next:\n  {command} {tmp_path}/students/seqkd\n" in text and "--stages seqkd,warmup,gad" in text
    for worse in ((0.2, 0.95), (0.05, None)):
        base = (0.1, None if worse[1] is None else 0.9)
        text = concluded(tmp_path, {0.8: report({"base": base, "seqkd": worse})})
        assert "no student is closer to the teacher than the base model" in text
        advice = text.partition("next:")[2]
        assert "vllm" not in advice and "chat" not in advice and "--stages" not in advice
        assert all(word in advice for word in ("total_epochs", "optim.lr", "--judge_temperatures"))


@pytest.mark.parametrize("accuracy", [0.7, None])
def test_a_student_that_is_an_earlier_one_is_neither_judged_nor_the_closest(tmp_path, accuracy):
    flags = ["--model", "m", "--data", "t", "--val", "v", "--exp_name", "x", "--out", str(tmp_path)]
    options = parse_options([*flags, "--stages", "seqkd,warmup,gad"])
    folders = {stage: tmp_path / "students" / stage for stage in options.stages}
    base = (0.1, None if accuracy is None else 0.9)
    reports = {0.8: report({"base": base, "seqkd": (0.3, accuracy), "gad": (0.2, accuracy and 0.8)})}
    text = conclude(options, folders, {"warmup": "seqkd"}, reports, {})
    assert f"student of warmup:  {tmp_path}/students/warmup (the weights of seqkd's)\n" in text
    assert "closest to the teacher: seqkd" in text and "warmup at" not in text
    assert f"{tmp_path}/students/seqkd\n" in text.partition("next:")[2] + "\n"
