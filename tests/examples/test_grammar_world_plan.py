"""The grammar world's plan and its report: every run is possible, and the table says what the results say."""

from __future__ import annotations

import json

import pytest

from examples.grammar_world.plan import COMMON, COST_OF_GAD, COST_OF_WARMUP, RUNS
from examples.grammar_world.report import cost, load, table
from examples.grammar_world.run import BY_NAME, needed, ready
from verl.trainer.config import compose_config


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_composes_and_starts_from_earlier_ones(run):
    names = [earlier.name for earlier in RUNS]
    assert all(names.index(parent) < names.index(run.name) for parent in run.parents)
    assert all(step % run.measured[0] == 0 and step <= run.steps for step in run.measured)
    required = ("data.train_files=x", "data.val_files=x", "actor_rollout_ref.model.path=x", "critic.model.path=x")
    config = compose_config([*COMMON, *run.overrides, *required, "trainer.experiment_name=x"])
    assert config.use_critic == (run.critic is not None)
    assert config.use_sft == (run.name.startswith(("SeqKD", "warmup-sft")))


def test_names_are_different_and_patterns_bring_their_parents():
    assert len(BY_NAME) == len(RUNS)
    names = [run.name for run in needed(["GAD-frozen-ranking-mean-fresh"])]
    assert names == ["SeqKD", "warmup-frozen-ranking-mean", "GAD-frozen-ranking-mean-fresh"]


def test_a_run_waits_for_its_parents():
    waiting = [(0, run) for run in needed(["GAD-frozen-ranking-mean-fresh"])]
    assert [run.name for _, run in ready(waiting, set())] == ["SeqKD"]
    assert [run.name for _, run in ready(waiting[1:], {(0, "SeqKD")})] == ["warmup-frozen-ranking-mean"]
    assert list(ready(waiting[1:], {(1, "SeqKD")})) == []


def test_costs_by_hand():
    # n = 8. GAD: 8 generated, 8 + 8 log-probs, 24 for the actor's update, 27 for the discriminator's: 75 forwards of an
    # answer, where SeqKD's update is 3. Warmup leaves the actor's update out: 51.
    assert (COST_OF_GAD, COST_OF_WARMUP) == (25, 17)
    seqkd, warmup, gad = needed(["GAD-frozen-ranking-mean-fresh"])
    assert cost(gad, 10) == seqkd.steps + 17 * warmup.steps + 250


def test_table_of_made_up_results(tmp_path):
    measures = dict.fromkeys(
        ("grammatical", "factual", "correct", "answer_coverage", "fact_set_coverage", "forward_kl", "length"), 0.0
    )
    for seed, correct in ((0, 0.4), (1, 0.6)):
        for name, steps in (("SeqKD", (0, 192)), ("SeqKD-long", (568, 1136))):
            folder = tmp_path / f"seed{seed}" / name
            folder.mkdir(parents=True)
            curve = [
                {"step": step, **measures, "correct": correct + i, "js": 0.3 + i / 10, "teacher_length": 19.0}
                for i, step in enumerate(steps)
            ]
            (folder / "result.json").write_text(json.dumps({"curve": curve}))
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "data": {}}) + "\n")
    rows = {line.split("|")[1].strip(): line.split("|") for line in table(load(tmp_path)).splitlines() if "±" in line}
    # Mean of 0.4 and 0.6, and their population deviation; the last student is at 1.4 and 1.6; the best JS is the first.
    assert [rows[name][4].strip() for name in ("base", "SeqKD", "SeqKD-long", "SeqKD-long, best JS")] == [
        "0.500 ± 0.100", "1.500 ± 0.100", "1.500 ± 0.100", "0.500 ± 0.100",
    ]  # fmt: skip
