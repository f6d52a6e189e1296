"""What is said of runs that went wrong and of runs that did not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.monitor.bad_runs import BAD_RUNS, changed, healthy_rows
from verl.monitor.rules import load_rules
from verl.monitor.series import Run
from verl.monitor.verdict import Words
from verl.monitor.watch import Watch, replay, source_of

HEALTHY = sorted((Path(__file__).parent / "healthy").glob("*.jsonl.gz"))


@pytest.fixture(scope="module")
def rules():
    return load_rules()


def alarms(watch: Watch) -> list[str]:
    return [alarm.rule.id for alarm in watch.alarms if not alarm.is_note]


@pytest.mark.parametrize("name", BAD_RUNS)
def test_the_first_cause_of_a_bad_run(rules, name):
    bad = BAD_RUNS[name]
    run = Run.of(name, bad.rows, bad.settings)
    watch = replay(run, rules)
    first, *others = watch.firing
    assert (first.rule.id, first.causes[0].knob) == (bad.rule, bad.knob)
    assert min(alarm.fired for alarm in watch.alarms if not alarm.is_note) <= 25
    assert set(bad.follow) <= {alarm.rule.id for alarm in others}
    for alarm in others:
        if alarm.rule.id in bad.follow:
            assert source_of(alarm, watch.firing) is not None
    verdict = Words(watch).report(run).splitlines()[0]
    assert verdict.startswith("Unhealthy at step") and bad.knob in verdict


def test_the_verdict_names_the_setting_with_the_value_that_it_has(rules):
    bad = BAD_RUNS["too strong"]
    run = Run.of("strong", bad.rows, bad.settings)
    watch = replay(run, rules)
    assert Words(watch).verdict(run) == (
        "Unhealthy at step 39: the discriminator is too strong and its scores teach little (critic/d_acc 0.98, healthy "
        "0.9 or less, since step 10). First cause: it learns faster than the student can follow. Turn critic.optim.lr "
        "(now 5e-06): lower it 3 to 10 times."
    )
    chinese = Words(watch, "zh").verdict(run)
    assert chinese.startswith("不健康（第 39 步）：判别器过强") and "critic.optim.lr（当前为 5e-06）" in chinese


def test_a_ppo_kl_of_0_is_said_to_be_exact(rules):
    rows = changed(30, lambda step: {"actor/ppo_kl": 0.0, "actor/pg_clipfrac": 0.0, "actor/pg_loss": 1e-9})
    run = Run.of("exact", rows)
    watch = replay(run, rules)
    report = Words(watch).report(run)
    assert report.startswith("Healthy: 30 steps of GAD, no alarm.")
    assert "with one mini-batch and one epoch per batch this is exact, not a fault" in report
    reused = Run.of("reused", rows, {"actor_rollout_ref": {"actor": {"ppo_epochs": 2}}})
    assert "the weights do not change although a batch is reused" in Words(replay(reused, rules)).report(reused)


@pytest.mark.parametrize("file", HEALTHY, ids=lambda file: file.name.partition(".")[0])
def test_healthy_runs_raise_no_alarm(rules, file):
    """Real ones: the quick start's stages, and a 135M student on a real teacher's text."""
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    run = Run.of(file.name, [(line["step"], line["data"]) for line in lines])
    watch = replay(run, rules)
    assert alarms(watch) == []
    assert Words(watch).verdict(run).startswith("Healthy: ")


# Over the batch, as in the quick start from step 63 on, where prompts with longer answers scored lower.
OVER_THE_BATCH = (-0.692, -0.611, -0.614, -0.82, -0.67, -0.668, -0.542, -0.708, -0.746, -0.688, -0.681, -0.613, -0.613)


@pytest.mark.parametrize(
    ("in_groups", "spread", "fires"),
    [(None, None, True), (0.05, 0.3, False), (0.65, 0.3, True), (-0.65, 0.16, True), (0.65, 0.14, False)],
)
@pytest.mark.parametrize("frozen", [0, 40])
def test_scores_follow_length_where_answers_are_compared(rules, in_groups, spread, fires, frozen):
    """How prompts differ trains nobody, and neither does a token more or less in fixed ways to answer. Runs without the
    finer metrics are judged by the coarse one."""
    rows = healthy_rows(40, seed=1, frozen=frozen)
    for step, data in rows:
        data["critic/length_reward_corr"] = OVER_THE_BATCH[step % len(OVER_THE_BATCH)]
        if in_groups is not None:
            data |= {"critic/length_reward_corr_in_groups": in_groups, "critic/group_length_spread": spread}
    assert alarms(replay(Run.of("x", rows), rules)) == (["length_rewarded"] if fires else [])


@pytest.mark.parametrize("seed", range(20))
def test_noise_raises_no_alarm(rules, seed):
    assert alarms(replay(Run.of("noise", healthy_rows(300, seed, frozen=10)), rules)) == []


def test_single_steps_raise_no_alarm(rules):
    """Trends, not points: every metric at an absurd value, in one step of ten."""
    rows = healthy_rows(100, seed=3)
    rows = [(step, {name: 1e3 if step % 10 == 5 else value for name, value in data.items()}) for step, data in rows]
    assert alarms(replay(Run.of("points", rows), rules)) == []


def test_an_alarm_ends_and_begins_again(rules):
    accuracy = [0.7] * 20 + [0.99] * 30 + [0.7] * 30 + [0.99] * 30
    watch = replay(Run.of("twice", list(enumerate({"critic/d_acc": v, "actor/pg_loss": 1.0} for v in accuracy))), rules)
    strong = [alarm for alarm in watch.alarms if alarm.rule.id == "discriminator_too_strong"]
    # The median of 8 values, the mean of the middle two: at step 23, with four high ones, it is .845, at step 24 .99;
    # it is .845 again at step 53. Six looks in a row make an alarm, and end one.
    assert [(alarm.since, alarm.fired, alarm.until) for alarm in strong] == [(24, 29, 52), (84, 89, None)]
    run = Run.of("over", list(enumerate({"critic/d_acc": v, "actor/pg_loss": 1.0} for v in accuracy[:80])))
    assert Words(replay(run, rules)).verdict(run) == "Healthy now: 80 steps of GAD; 1 alarm(s) earlier, all over."


@pytest.mark.parametrize(
    ("values", "since"),
    [
        ([0.2, 0.3, 0.6, 0.7], None),  # It rises: the mean of the last two is far below the best, and nothing falls.
        ([0.6, 0.5, 0.6, 0.5], None),  # One validation alone may be worse.
        ([0.6, 0.52, 0.52, 0.52], None),  # 0.52 / 0.6 = 0.87.
        ([0.6, 0.6, 0.5, 0.5, 0.5], 3),  # 0.5 / 0.6 = 0.83, in two validations.
    ],
)
def test_what_falls_has_fallen_twice(rules, values, since):
    rows = healthy_rows(10 * len(values), seed=1)
    for step, data in rows:
        data.pop("val/rouge-L/mean", None)
        if step % 10 == 0:
            data["val/rouge-L/mean"] = values[step // 10]
    fired = [alarm for alarm in replay(Run.of("x", rows), rules).alarms if alarm.rule.id == "rouge_falls"]
    assert [alarm.since for alarm in fired] == ([] if since is None else [10 * since])


def test_missing_metrics_leave_rules_silent(rules):
    run = Run.of("few", [(step, {"critic/d_acc": 0.7}) for step in range(30)])
    watch = replay(run, rules)
    assert alarms(watch) == []
    report = Words(watch).report(run, verbose=True)
    assert "length_rewarded: critic/length_reward_corr is not logged" in report
    assert "discriminator_too_strong" not in report
    nothing = Run.of("nothing", [(step, {"x": 1.0}) for step in range(30)])
    assert Words(replay(nothing, rules)).verdict(nothing).startswith("Cannot say:")


def test_a_note_asks_for_nothing_in_either_language(rules):
    """One mini-batch and one epoch: a ppo_kl of 0 is exact."""
    rows = [(step, data | {"actor/ppo_kl": 0.0, "actor/grad_norm": 1.0}) for step, data in healthy_rows(40, seed=0)]
    settings = {"actor_rollout_ref": {"actor": {"ppo_epochs": 1}}}
    run = Run.of("exact", rows, settings)
    watch = replay(run, rules)
    english, chinese = (Words(watch, language).report(run) for language in ("en", "zh"))
    assert [alarm.rule.id for alarm in watch.notes] == ["ppo_kl_exact"] and "Turn" not in english
    assert "Setting: actor_rollout_ref.actor.ppo_epochs (now 1), set it to 2 only if" in english
    assert "actor/ppo_kl 的绝对值为 0，" in chinese and "调整" not in chinese


def test_reasons_of_silent_rules_are_in_the_readers_language(rules):
    run = Run.of("few", [(step, {"critic/d_acc": 0.7}) for step in range(3)])
    chinese = Words(replay(run, rules), "zh").report(run, verbose=True)
    silent = chinese.partition("没有取值的规则：\n")[2].splitlines()[:-1]
    assert "  length_rewarded：critic/length_reward_corr 没有记录" in silent
    assert len(silent) > 20 and not [line for line in silent if " is " in line or " has " in line or " of " in line]


def test_upstreams_and_trls_names_are_known(rules):
    upstream = [
        (
            step,
            {
                "actor/pg_loss": 0.0,
                "actor/grad_norm": 0.0,
                "critic/advantages/max": 0.0,
                "critic/advantages/min": 0.0,
                "response_length/clip_ratio": 0.1,
            },
        )
        for step in range(1, 30)
    ]
    assert replay(Run.of("upstream", upstream), rules).firing[0].rule.id == "no_policy_signal"
    trl = [(step, {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.95, "loss": 0.0}) for step in range(30)]
    assert alarms(replay(Run.of("trl", trl), rules)) == ["answers_cut", "answers_alike"]


def test_a_stage_is_told_by_its_metrics(rules):
    rows = healthy_rows(20, seed=0, frozen=10)
    sft = [(step, {"actor/sft_loss": 1.0, "actor/grad_norm": 1.0}) for step in range(5)]
    assert replay(Run.of("gad", rows), rules).stages == ["warmup", "GAD"]
    assert replay(Run.of("sft", sft), rules).stages == ["SeqKD"]
    assert replay(Run.of("soda", [(0, {"actor/soda_loss": 0.7})]), rules).stages == ["SODA"]


def test_steps_come_in_order(rules):
    watch = Watch(rules)
    watch.see(3, {"critic/d_acc": 0.7})
    watch.see(3, {"val/critic/d_acc": 0.7})
    with pytest.raises(ValueError, match="step 2 after step 3"):
        watch.see(2, {"critic/d_acc": 0.7})
