"""The monitor in real runs: an alarm is said and sent, ends a run that asks for it, and is remembered on resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.running import read_metrics
from verl.monitor.live import StoppedByAlarm
from verl.monitor.rules import load_rules
from verl.monitor.watch import Watch
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in

pytestmark = pytest.mark.e2e

# n equal answers to each prompt: groups without a spread from the first step on, so that the median of 10 steps is 1 at
# step 9, and the rule, which waits for 3 looks, fires at step 11.
ALIKE = ("actor_rollout_ref.rollout.temperature=1e-4", "actor_rollout_ref.actor.use_kl_loss=False")
FIRES = 11


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "verl.monitor.live"]


def test_an_alarm_stops_a_run_and_the_same_command_goes_on(run, folder, caplog):
    caplog.set_level("INFO")
    # So small a student, which cannot end an answer, sets off others as well.
    others = (rule.id for rule in load_rules().rules if rule.id != "answers_alike")
    file = folder / "others_off.yaml"
    file.write_text("rules:\n" + "".join(f"- {{id: {name}, enabled: false, explains: []}}\n" for name in others))
    rules = f"trainer.monitor_rules={file}"
    settings = (*ALIKE, "trainer.on_alarm=stop", "trainer.logger=[file,tensorboard]", rules)
    with pytest.raises(StoppedByAlarm, match="stopped after step 11 by the alarm answers_alike") as end:
        run("stopped", *settings, steps=15)
    assert "Turn actor_rollout_ref.rollout.temperature (now 0.0001)" in str(end.value)
    said = [line for line in warnings(caplog) if "ALARM answers_alike" in line]
    assert len(said) == 1 and said[0].startswith(f"step {FIRES}: ALARM answers_alike:")
    state = json.loads((folder / "runs/stopped/global_step_12/trainer_state.json").read_text())
    assert (state["global_step"], state["samples_seen"]) == (12, 12 * 4), "no row is taken twice when it goes on"

    caplog.clear()
    path = run("stopped", *settings, steps=15)
    assert sorted(read_metrics(path)) == list(range(15)), "it goes on: what fires already is no new alarm"
    assert [line for line in warnings(caplog) if "answers_alike" in line] == []
    assert [folder.name for folder in checkpoints_in(path)] == ["global_step_12", "global_step_15"]
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    texts = events.Tensors("alarms/answers_alike/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts] == [(FIRES, said[0])]
    started = json.loads((path / "run.json").read_text())["starts"]
    assert [start["changed"]["actor_rollout_ref.rollout.temperature"] for start in started] == [[1.0, 1e-4]] * 2
    assert {"critic/student_score/p50", "critic/teacher_score/p95"} <= read_metrics(path)[14].keys()
    kept = json.loads((path / "settings.json").read_text())
    assert kept["actor_rollout_ref"]["rollout"]["temperature"] == 1e-4

    verdict = subprocess.run(
        [sys.executable, "-m", "verl.monitor", str(path), "--rules", str(file), "--html", str(path / "report.html")],
        capture_output=True,
        text=True,
    )
    assert '"kind":"quantiles"' in (path / "report.html").read_text()
    assert verdict.returncode == 1
    assert verdict.stdout.startswith("Unhealthy at step 14: the answers to a prompt get equal scores")
    assert "(now 0.0001)" in verdict.stdout.splitlines()[0]


def test_a_monitor_that_fails_does_not_end_a_run(run, caplog, monkeypatch):
    def broken(self, step, data):
        raise ZeroDivisionError("of the monitor's own")

    monkeypatch.setattr(Watch, "see", broken)
    assert sorted(read_metrics(run("failing", "trainer.on_alarm=stop"))) == [0, 1, 2]
    off = [line for line in warnings(caplog) if "the health monitor is off from here" in line]
    assert len(off) == 1 and "ZeroDivisionError: of the monitor's own" in off[0]


def test_the_command_ends_with_exit_code_3_and_says_why_last(folder):
    """The real command line in a process of its own, on one rank without Ray."""
    program = (
        "from verl.trainer import main_ppo\nfrom verl.trainer.in_process import run_in_process\n"
        "main_ppo.run_ppo = run_in_process\nmain_ppo.main()\n"
    )
    rules = folder / "rules.yaml"
    rules.write_text(
        "rules:\n- id: short\n  label: step\n  value: step()\n  healthy: [null, 0]\n  for: 1\n  says: it is late\n"
        "  causes: [{text: time passes, knob: trainer.total_training_steps, turn: lower it}]\n"
    )
    arguments = [
        "stage=seqkd",
        "trainer.device=cpu",
        f"data.train_files={folder}/train.jsonl",
        "data.train_batch_size=4",
        "data.max_prompt_length=28",
        "data.max_response_length=10",
        f"actor_rollout_ref.model.path={folder}/base",
        f"trainer.default_local_dir={folder}/runs/command",
        "trainer.experiment_name=command",
        "trainer.total_training_steps=3",
        "trainer.logger=[file]",
        "trainer.on_alarm=stop",
    ]

    def command(*more: str) -> subprocess.CompletedProcess:
        arguments_ = [sys.executable, "-c", program, *arguments, *more]
        return subprocess.run(arguments_, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    done = command(f"trainer.monitor_rules={rules}")
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "stopped after step 1 by the alarm short (trainer.on_alarm=stop): it is late" in last
    assert "Turn trainer.total_training_steps (now 3): lower it." in last
    assert (folder / "runs" / "command" / "global_step_2" / "actor").is_dir()
    rules.write_text("rules:\n- id: short\n  window: many\n")
    refused = command(f"trainer.monitor_rules={rules}")
    assert refused.returncode == 1
    assert "rule short: window: expected a whole number from 1 to 1000, got 'many'; fix:" in refused.stderr
