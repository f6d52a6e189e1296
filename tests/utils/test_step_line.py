"""A step's line: what it shows in each stage, and that it fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from verl.utils import step_line as module
from verl.utils.step_line import (
    ADVERSARIAL,
    SEQKD,
    SODA,
    VALIDATION,
    StepLines,
    number,
    read_line,
    step_line,
    validation_line,
)
from verl.utils.tracking import Tracking

COMMON = {"timing_s/step": 12.34, "perf/cpu_memory_used_gb": 5.67, "training/global_step": 6}
SFT = COMMON | {"actor/sft_loss": 1.5, "actor/grad_norm": 0.25, "actor/lr": 5e-6, "actor/entropy": 2.0}
GAD = COMMON | {
    "critic/d_acc": 0.667,
    "critic/score_diff": -0.195,
    "critic/student_score_mean": 0.485,
    "critic/d_loss": 0.995,
    "critic/grad_norm": 1145.2,
    "response_length/mean": 123.44,
    "response_length/clip_ratio": 0.05,
}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.000"),
        (0.6667, "0.667"),
        (-0.6667, "-0.67"),
        (9.9996, "10.00"),
        (123.44, "123.4"),
        (-1234.4, "-1234"),
        (99999, "99999"),
        (123456, "  1e5"),
        (-123456, " -1e5"),
        (5e-6, " 5e-6"),
        (-2e-5, "-2e-5"),
        (-9e-10, "0.000"),
        (float("nan"), "  nan"),
        (float("-inf"), " -inf"),
    ],
)
def test_a_number_has_five_characters(value, shown):
    assert number(value) == shown


def test_the_lines_of_each_stage():
    assert step_line(6, 80, SFT, left=300) == (
        "step  7/80 | loss 1.500 grad 0.250 lr  5e-6 | rouge     . len     . clip     . | entropy 2.000 | 12.34s   6G "
        "eta   5min"
    )
    assert step_line(6, 80, GAD) == (
        "step  7/80 | d_acc 0.667 diff -0.20 score 0.485 | len 123.4 clip 0.050 | d_loss 0.995 d_grad  1145 | "
        "loss     . grad     . | kl     . | 12.34s   6G"
    )
    soda = COMMON | {"actor/soda_loss": 0.5, "actor/soda_acc": 0.9, "actor/soda_margin": 1.25}
    assert "loss 0.500 acc 0.900 margin 1.250" in step_line(6, 80, soda)


def test_warmup_by_sft_shows_its_loss_where_the_policys_would_be():
    assert "sft  1.250 grad" in step_line(6, 80, GAD | {"actor/sft_loss": 1.25})
    assert "loss 0.125 grad" in step_line(6, 80, GAD | {"actor/pg_loss": 0.125})


@pytest.mark.parametrize("stage", [SEQKD, SODA, ADVERSARIAL])
@pytest.mark.parametrize("width", [80, 120, 160, 500])
def test_lines_fit_and_align(stage, width):
    names = [name for cells in stage for _, name in cells]
    lengths = set()
    for value in (0.5, -123456.0, 1e-7, float("nan")):
        metrics = COMMON | dict.fromkeys(names, value)
        for step, left in ((0, 5), (99_998, 1e6)):
            line = step_line(step, 99_999, metrics, left, width)
            assert len(line) <= min(width, 160)
            lengths.add(len(line))
            wide = step_line(step, 99_999, metrics, left)
            assert all(f"{cells[0][0]} " in wide for cells in stage[:4])
    assert len(lengths) == 1


def test_a_validation_has_a_line_of_its_own():
    metrics = {"val/rouge-L/mean": 0.795, "val/sft_loss": 1.25, "val/critic/d_acc": 0.6, "val/other": 1.0}
    assert validation_line(20, metrics) == "validation at step 20: rouge-L 0.795, sft_loss 1.250, d_acc 0.600"
    assert validation_line(20, SFT) is None


@pytest.mark.parametrize("stage", [SEQKD, SODA, ADVERSARIAL])
def test_a_line_is_read_as_it_was_shown(stage):
    """What it had room for; numbers rounded."""
    metrics = COMMON | {name: 0.25 for cells in stage for _, name in cells}
    step, read = read_line("12:00:00 said | " + step_line(6, 80, metrics, left=300))
    assert (step, {float(value) for value in read.values()}) == (6, {0.25})
    assert set(read) == {name for cells in stage for _, name in cells}
    assert set(read_line(step_line(6, None, metrics, width=80))[1]) >= {name for _, name in stage[0]}
    lacking = {name: value for name, value in metrics.items() if name != stage[-1][0][1]}
    assert set(read_line(step_line(6, 80, lacking))[1]) == set(read) - {stage[-1][0][1]}


def test_lines_of_warmup_by_sft_and_of_validations_are_read_too():
    assert read_line(step_line(6, 80, GAD | {"actor/sft_loss": 1e-5}))[1]["actor/sft_loss"] == "1e-5"
    validated = {name: 0.5 for _, name in VALIDATION}
    assert read_line(validation_line(20, validated)) == (20, dict.fromkeys(validated, "0.500"))
    assert read_line("step 7 of the manual") is None and read_line("step:7 - critic/d_acc:0.5") is None


def test_fast_steps_are_shown_now_and_then_and_the_last_one_always(monkeypatch, capsys):
    clock = iter([0.0, 0.5, 0.9, 1.1, 1.2, 1.3, 1.4])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Tracking("p", "e", total_steps=5) as tracking:
        for step in range(4):
            tracking.log(SFT, step)
        tracking.log(SFT | {"val/rouge-L/mean": 0.5}, 4)
        tracking.log({"val/rouge-L/mean": 0.75}, 5)
        tracking.log(SFT, 5)
    shown = [line.partition(" |")[0] for line in capsys.readouterr().out.splitlines()]
    # At 0.0 and 1.1 s, with the validation at 1.2 s; the last one is shown at the end.
    assert shown == [
        "step 1/5", "step 4/5", "validation at step 4: rouge-L 0.500", "step 5/5",
        "validation at step 5: rouge-L 0.750", "step 6/5",
    ]  # fmt: skip


def test_time_left():
    lines = StepLines(None)
    assert "eta" not in "".join(lines.of(SFT, 0))
    assert step_line(0, 10, SFT, 119).endswith("eta   119s")
    assert step_line(0, 10, SFT, 7199).endswith("eta 120min")
    assert step_line(0, 10, SFT, 9000).endswith("eta   2.5h")


def test_metrics_that_are_not_the_trainers_are_no_steps_of_it():
    assert StepLines(None).of({"loss": 1.0}, 0) is None
