"""Runs log what docs/reference/metrics.md says of their stage: nothing else, and all of it but what needs a GPU."""

from __future__ import annotations

import pytest

from docs_site import metrics
from tests.e2e.running import read_metrics, train
from tests.other_tokenizer import write_other_model
from verl.trainer.in_process import run_in_process

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

REWARD = "def compute_score(prompt, answer, teacher):\n    return len(answer) / 10\n"
COMMON = ("trainer.val_before_train=True", "trainer.test_freq=2", "trainer.best_metric=val/rouge-L/mean")
SCORED = (*COMMON, "critic.optim.lr=1e-3", "trainer.save_freq=1")
# Stage and settings of each run, with settings that add metrics.
RUNS = {
    "seqkd": ("seqkd", ("stage=seqkd", *COMMON)),
    "warmup": ("warmup", ("stage=warmup", "trainer.critic_warmup=1", *SCORED)),
    "warmup_by_sft": ("warmup", ("stage=warmup", "trainer.warmup_use_sft=True", *SCORED)),
    "head_start": (
        "warmup",
        ("stage=warmup", "trainer.critic_warmup=auto", "critic.head_start.check_every=1", "critic.head_start.checks=1",
         "critic.head_start.accuracy=0", "critic.ppo_epochs=2", *SCORED),
    ),
    "gad": (
        "gad",
        ("stage=gad", "trainer.critic_warmup=0", "custom_reward_function.path={folder}/reward.py",
         "algorithm.use_kl_in_reward=True", "algorithm.length_correction=True", "critic.replay.capacity=60",
         "critic.replay.fraction=0.5", "critic.discriminator.loss=ranking",
         "critic.discriminator.adaptive_temperature.enable=True", *SCORED),
    ),
    "hinge": (
        "gad",
        ("stage=gad", "trainer.critic_warmup=1", "critic.discriminator.loss=two_sided_hinge",
         "algorithm.rollout_is=token", *SCORED),
    ),
    "own_tokens": ("warmup", ("stage=warmup", "trainer.critic_warmup=1", *SCORED)),
    "soda": ("soda", ("stage=soda", "soda.sft_coef=0.5", "actor_rollout_ref.rollout.n=1", *COMMON)),
}  # fmt: skip
# Where there is a GPU, or where an update is not finite.
ELSEWHERE = {"perf/mfu/actor", "perf/mfu/critic", "perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"}
ELSEWHERE |= {"actor/skipped_steps", "critic/skipped_steps"}
# Where answers are written a step ahead, by processes of their own (test_rollout_ahead.py).
ELSEWHERE |= {"training/rollout_staleness", "timing_s/gen_wait"}


@pytest.fixture(scope="module")
def logged(folder, run) -> dict[str, set[str]]:
    """The names that each run logs in four steps."""
    (folder / "reward.py").write_text(REWARD)
    others = {"own_tokens": write_other_model(folder / "other")}
    found = {}
    for name, (_, settings) in RUNS.items():
        # An untrained discriminator may not reward from the first step on.
        others["gad"] = folder / "runs/warmup/global_step_4/critic"
        start = others.get(name, folder / "base")
        critic = [] if name in ("seqkd", "soda") else [f"critic.model.path={start}"]
        given = [setting.format(folder=folder) for setting in settings]
        where = train(folder, name, *given, *critic, "trainer.total_training_steps=4", run_with=run_in_process)
        found[name] = {metric for step in read_metrics(where).values() for metric in step}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_what_the_catalogue_has_of_its_stage(logged, name):
    assert sorted(logged[name] - metrics.names(RUNS[name][0])) == []


def test_every_metric_of_the_catalogue_is_logged_by_a_run(logged):
    assert sorted(metrics.names() - set.union(*logged.values()) - ELSEWHERE) == []
