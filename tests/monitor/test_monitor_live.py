"""The monitor beside a run: what it says and sends, what it remembers, and that its faults stay its own.

`tests/e2e/test_alarms.py` has it in real runs.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from tests.monitor.bad_runs import BAD_RUNS, changed
from verl.monitor.live import Monitor
from verl.monitor.watch import Watch
from verl.utils.tracking import Tracking, WandbBackend

ROWS = BAD_RUNS["too strong"].rows
SETTINGS = {"critic": {"optim": {"lr": 5e-6}}}
FIRES = 15


class Sent:
    """Trackers that keep alarms."""

    metrics_file = None

    def __init__(self, error=None):
        self.alarms = []
        self.error = error

    def alert(self, title, text, step):
        if self.error is not None:
            raise self.error
        self.alarms.append((title, text, step))


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level("INFO", logger="verl.monitor.live")


def monitor(folder, tracking, on_alarm="warn", first_step=0, rules=None):
    return Monitor(SETTINGS, folder, tracking, first_step, rules, on_alarm)


def show(watching, rows):
    for step, data in rows:
        watching.see(step, data)


def test_an_alarm_is_one_line_and_one_message_and_one_more_line_when_it_is_over(tmp_path, caplog):
    rows = changed(60, lambda step: {"critic/d_acc": 0.98 if 5 <= step < 30 else 0.7})
    sent = Sent()
    watching = monitor(tmp_path, sent)
    show(watching, rows)
    begins, ends = (line for line in caplog.messages if "discriminator_too_strong" in line)
    # The median of 8 is above .9 from step 9 on, at the fifth high value; the sixth look is at 14.
    assert begins == (
        "step 14: ALARM discriminator_too_strong: the discriminator is too strong and its scores teach little "
        "(critic/d_acc 0.98, healthy 0.9 or less, since step 9). First cause: it learns faster than the student can "
        "follow. Turn critic.optim.lr (now 5e-06): lower it 3 to 10 times."
    )
    assert ends == "step 38: discriminator_too_strong is over; it held from step 9 to 32"
    assert sent.alarms == [("discriminator_too_strong", begins, 14)]
    assert watching.stopped is None


def test_an_alarm_that_follows_from_another_says_so(tmp_path, caplog):
    show(monitor(tmp_path, Sent()), BAD_RUNS["d_acc .998, clip ratio 1.0"].rows)
    line = next(line for line in caplog.messages if "ALARM discriminator_too_strong" in line)
    assert " (follows from answers_cut) First cause" in line


def test_notes_are_said_once_and_are_no_alarms(tmp_path, caplog):
    sent = Sent()
    watching = monitor(tmp_path, sent, "stop")
    show(watching, changed(30, lambda step: {"actor/ppo_kl": 0.0}))
    assert [line.partition(":")[0] for line in caplog.messages] == ["step 6"]
    assert "note ppo_kl_exact" in caplog.messages[0]
    assert sent.alarms == [] and watching.stopped is None


def test_off_does_nothing_at_all(tmp_path, caplog):
    show(monitor(tmp_path, Sent(), "off"), ROWS)
    assert caplog.messages == [] and list(tmp_path.iterdir()) == []


def test_a_resumed_run_is_where_it_was(tmp_path, caplog):
    """Rebuilt from metrics.jsonl: the same alarms at the same steps as without a stop, and none of them twice."""
    for stop_at in (8, FIRES, FIRES + 1, 30):
        folder = tmp_path / str(stop_at)
        with Tracking("p", "e", "file", log_dir=folder, resumed=False) as tracking:
            first = monitor(folder, tracking)
            for step, data in ROWS[: stop_at + 3]:  # Three steps that are not in the checkpoint.
                tracking.log(data, step)
                first.see(step, data)
        caplog.clear()
        with Tracking("p", "e", "file", log_dir=folder, first_step=stop_at) as tracking:
            second = monitor(folder, tracking, "stop", first_step=stop_at)
            assert caplog.messages == []
            show(second, ROWS[stop_at:])
        whole = monitor(tmp_path, Sent())
        caplog.clear()
        show(whole, ROWS)
        known = [(alarm.rule.id, alarm.since, alarm.fired) for alarm in whole.watch.alarms]
        assert [(alarm.rule.id, alarm.since, alarm.fired) for alarm in second.watch.alarms] == known
        assert (second.stopped is not None) == (stop_at <= FIRES)


def test_without_metrics_of_its_own_a_resumed_run_begins_anew(tmp_path):
    watching = monitor(tmp_path, Sent(), first_step=20)
    show(watching, ROWS[20:])
    assert [alarm.fired for alarm in watching.watch.alarms] == [32]


def test_its_settings_are_kept_and_a_full_disk_is_no_reason_to_be_off(tmp_path, caplog):
    monitor(tmp_path, Sent())
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    (tmp_path / "file").write_text("")
    watching = monitor(tmp_path / "file", Sent())
    assert "could not be written" in caplog.text and watching.watch is not None


def test_a_fault_of_its_own_is_said_once_and_ends_nothing(tmp_path, caplog, monkeypatch):
    watching = monitor(tmp_path, Sent(), "stop")
    monkeypatch.setattr(Watch, "_look", lambda *_: 1 / 0)
    show(watching, ROWS)
    assert len(caplog.messages) == 1
    assert "the health monitor is off from here (ZeroDivisionError: division by zero)" in caplog.messages[0]
    assert watching.stopped is None


def test_rules_that_broke_after_the_check_and_a_log_that_is_none(tmp_path, caplog):
    (tmp_path / "rules.yaml").write_text("rules: [")
    watching = monitor(tmp_path, Sent(), rules=str(tmp_path / "rules.yaml"))
    show(watching, ROWS)
    assert len(caplog.messages) == 1 and "off from here (RuleFault" in caplog.messages[0]
    caplog.clear()
    (tmp_path / "metrics.jsonl").write_text("no\nlog\n")
    tracking = Sent()
    tracking.metrics_file = tmp_path / "metrics.jsonl"
    show(monitor(tmp_path, tracking, first_step=3), ROWS)
    assert "cannot look at the steps before this start" in caplog.messages[0]
    assert any("ALARM discriminator_too_strong" in line for line in caplog.messages)


@pytest.mark.parametrize("key", ["trainer.experiment_name", "data.val_files"])
def test_a_rule_about_a_setting_that_is_no_number_is_silent_and_the_others_go_on(tmp_path, caplog, key):
    rules = tmp_path / "rules.yaml"
    rule = f"- {{id: odd, label: x, value: setting('{key}'), healthy: [0, 1], says: x, causes: [{{text: x}}]}}"
    rules.write_text(f"rules:\n{rule}\n")
    settings = {"trainer": {"experiment_name": "abc"}, "data": {"val_files": None}}
    watching = Monitor(settings, tmp_path, Sent(), 0, str(rules), "warn")
    watching.see(0, {"critic/d_acc": 0.6})
    assert watching.watch is not None and watching.watch.unknown["odd"].reason == "no_number"
    assert "odd" not in caplog.text


def test_a_tracker_that_refuses_an_alarm_is_no_fault_of_the_monitor(tmp_path, caplog):
    watching = monitor(tmp_path, Sent(RuntimeError("no network")), "stop")
    show(watching, ROWS)
    assert "the alarm could not be sent to a tracker (RuntimeError: no network)" in caplog.text
    assert watching.watch is not None and watching.stopped is not None


def test_it_is_off_if_it_is_slow(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("verl.monitor.live.SLOW_S", 0.01)
    monkeypatch.setattr(Watch, "_look", lambda *_: time.sleep(0.001))
    watching = monitor(tmp_path, Sent())
    show(watching, ROWS)
    assert len(caplog.messages) == 1 and "it took more than" in caplog.messages[0]
    assert watching.watch is None


def test_a_look_takes_no_time(tmp_path):
    """Late in a long run as early, with every metric that a run logs."""
    rows = changed(3000, lambda step: {f"other/{number}": 1.0 for number in range(100)})
    watching = monitor(tmp_path, Sent())
    show(watching, rows[:-200])
    start = time.process_time()
    show(watching, rows[-200:])
    assert (time.process_time() - start) / 200 < 0.02


def test_wandb_gets_an_alert(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with Tracking("p", "e", "wandb", log_dir=tmp_path, resumed=False) as tracking:
        assert tracking.flush()
        (backend,) = tracking.backends
        assert isinstance(backend, WandbBackend)
        sent = []
        run = backend.run

        def alert(**what):
            sent.append(what)
            run.alert(**what)

        monkeypatch.setattr(backend, "run", SimpleNamespace(alert=alert, finish=run.finish))
        show(monitor(tmp_path, tracking), ROWS)
    assert [alert["title"] for alert in sent] == ["discriminator_too_strong"]
    assert sent[0]["text"].startswith("step 15: ALARM") and sent[0]["level"].value == "WARN"
