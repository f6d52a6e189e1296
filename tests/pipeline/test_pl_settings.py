"""Which settings each stage gets, held against what the stage scripts really give; and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from verl.pipeline.options import STAGES, parse_options
from verl.pipeline.settings import WITH_CRITIC, Models, compose, stage_arguments, unused_settings, user_settings
from verl.trainer.config import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "seqkd": "gpt5-8b-SeqKD-gspo.sh",
    "warmup": "gpt5-8b-warmup-gspo.sh",
    "gad": "gpt5-8b-gad-gspo.sh",
    "soda": "gpt5-8b-soda.sh",
}
FLAGS = ["--model", "/m/base", "--data", "/d/train.parquet", "--val", "/d/test.parquet", "--exp_name", "x"]


def options(*more):
    return parse_options([*FLAGS, *more])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gets_what_its_script_gives(stage, tmp_path):
    """PYTHON records the script's own call of the trainer."""
    recorder = tmp_path / "python"
    recorder.write_text(
        '#!/bin/bash\n[[ $2 == verl.trainer.main_ppo ]] && { printf "%s\\n" "${@:3}"; exit; }\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    critic = ["--reward_model", "/m/critic"] if stage in WITH_CRITIC else []
    environment = {"PYTHON": str(recorder), "N_GPUS_PER_NODE": "3", "DATA_DIR": "/d", "TENSORBOARD": "off"}
    given = subprocess.run(
        ["bash", str(ROOT / "scripts" / "train" / SCRIPTS[stage]), "--model", "/m/student", *critic, "--exp_name", "x",
         "--nnodes", "2"],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60,
    ).stdout.splitlines()  # fmt: skip
    models = Models("/m/student", "/m/critic")
    ours = stage_arguments(stage, models, ["/d/train.parquet"], ["/d/test.parquet"], "x", 2, 3)
    assert sorted(given) == sorted(ours)


def test_settings_go_where_they_have_an_effect_and_a_stages_own_win():
    found = user_settings(
        options(
            "gad.data.train_batch_size=4", "data.train_batch_size=8", "critic.optim.lr=1e-3", "soda.beta=0.2",
            "+warmup.trainer.total_epochs=3", "actor_rollout_ref.rollout.n=5", "trainer.sft_monitor_freq=1",
            "actor_rollout_ref.rollout.name=hf", "actor_rollout_ref.actor.clip_ratio_low=0.1",
            "soda.trainer.test_freq=1",
        )
    )  # fmt: skip
    everywhere = ["data.train_batch_size=8"]
    engine = "actor_rollout_ref.rollout.name=hf"
    adversarial = ["critic.optim.lr=1e-3", "actor_rollout_ref.rollout.n=5"]
    clip = "actor_rollout_ref.actor.clip_ratio_low=0.1"
    assert found == {
        "seqkd": [*everywhere, "trainer.sft_monitor_freq=1", engine],
        "warmup": [*everywhere, *adversarial, engine, clip, "+trainer.total_epochs=3"],
        "gad": [*everywhere, *adversarial, engine, clip, "data.train_batch_size=4"],
        "soda": [*everywhere, "soda.beta=0.2", engine, "trainer.test_freq=1"],
    }


def test_composed_settings_are_the_presets_with_the_users_over_them(tmp_path):
    line = options(
        "--out", str(tmp_path), "--data", "/d/it's, 2.jsonl", "--stages", "seqkd,warmup,gad", "trainer.device=cpu",
        "trainer.total_epochs=5", "gad.trainer.total_epochs=7", "actor_rollout_ref.actor.sft_anchor_coef=0.7",
    )  # fmt: skip
    seqkd, warmup, gad = (compose(line, stage, Models("/m/s", "/m/c")) for stage in line.stages)
    assert [config.stage for config in (seqkd, warmup, gad)] == ["SeqKD", "warmup", "GAD"]
    assert [config.trainer.total_epochs for config in (seqkd, warmup, gad)] == [5, 5, 7]
    assert [c.actor_rollout_ref.actor.sft_anchor_coef for c in (seqkd, warmup, gad)] == [0.0, 0.7, 0.7]
    assert gad.data.train_files == ["/d/train.parquet", "/d/it's, 2.jsonl"]
    assert (gad.actor_rollout_ref.model.path, gad.critic.model.path) == ("/m/s", "/m/c")
    assert (gad.trainer.experiment_name, gad.trainer.default_local_dir) == ("x/gad", str(tmp_path / "gad"))


def test_what_no_stage_gets_is_known():
    line = options("--stages", "seqkd", "critic.optim.lr=1", "gad.trainer.total_epochs=1", "trainer.total_epochs=2")
    assert [given.text for given in unused_settings(line)] == ["critic.optim.lr=1", "trainer.total_epochs=1"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("actor_rollout_ref.model.path=/m", "the pipeline decides actor_rollout_ref.model.path; give --model instead"),
        ("gad.critic.model.path=/m", "the pipeline decides critic.model.path; give --reward_model instead"),
        ("++data.train_files=x", "give --data instead"),
        ("stage=gad", "give --stages instead"),
        ("warmup.trainer.resume_mode=disable", "the pipeline decides trainer.resume_mode; leave it out"),
        ("seqkd", "'seqkd' sets nothing: expected KEY=VALUE, or STAGE.KEY=VALUE"),
    ],
)
def test_what_the_pipeline_decides_is_refused(setting, says):
    with pytest.raises(ConfigError) as error:
        user_settings(options(setting))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("sekqd", "expected stages of seqkd, warmup, gad, soda"),
        ("", "expected stages of"),
        ("gad,warmup", "expected this order"),
        ("seqkd,seqkd", "expected each stage once"),
        ("seqkd,gad,soda", "expected SODA or warmup and GAD"),
    ],
)
def test_orders_that_make_no_sense(stages, says, capsys):
    with pytest.raises(SystemExit) as end:
        options("--stages", stages)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_the_default_is_what_the_evidence_recommends():
    line = options()
    assert line.stages == ("seqkd",) and line.judge_temperatures == (0.8, 1.0)
    assert line.out == Path.cwd() / "checkpoints" / "gad" / "x"
