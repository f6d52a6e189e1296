"""The band that the discriminator's accuracy is kept in, and its head start."""

from __future__ import annotations

import logging

import pytest

from verl.config import BalanceConfig
from verl.trainer.config import ConfigError, compose_config
from verl.trainer.ppo.discriminator_balance import DiscriminatorBalance
from verl.trainer.ppo.head_start import DiscriminatorCouldNotLearn, HeadStart
from verl.trainer.ppo.held_out import HeldOutAccuracy

BAND = BalanceConfig(enable=True, lowest=0.55, highest=0.85, smoothing=0.5)


def test_the_band():
    balance = DiscriminatorBalance(BAND, epochs=1)
    seen = []
    for accuracy in (0.5, 0.7, 0.9, 1.0, 0.8, 0.6):
        seen.append(balance.epochs())
        balance.observe(accuracy)
    # Smoothed: .5, .6, .75, .875, .8375 (and .71875 at the end); what is known at a step is from the steps before.
    assert seen == [1, 2, 1, 1, 0, 1]
    assert balance.accuracy == pytest.approx(0.71875)


def test_epochs_count_from_the_configured_ones():
    balance = DiscriminatorBalance(BAND, epochs=3)
    balance.observe(0.2)
    assert balance.epochs() == 4
    balance.accuracy = 0.99
    assert balance.epochs() == 0


def test_switched_off_it_only_looks():
    balance = DiscriminatorBalance(BalanceConfig(enable=False, lowest=0.55, highest=0.85, smoothing=0.5), epochs=1)
    balance.observe(1.0)
    assert balance.epochs() == 1 and balance.accuracy == 1.0


def config(*overrides: str):
    required = ["data.train_files=x", "data.val_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    return compose_config(["stage=warmup", *required, *overrides])


def auto(accuracies: list[float], *overrides: str, total_steps: int = 1000) -> HeadStart:
    measured = iter(accuracies)
    settings = ("trainer.critic_warmup=auto", "critic.head_start.check_every=2", *overrides)
    return HeadStart(config(*settings), lambda: HeldOutAccuracy(next(measured), 0.05, 32), total_steps)


def test_a_number_of_steps():
    start = HeadStart(config("trainer.critic_warmup=3"), None, 5)
    assert start.state() == {}, "a run that is resumed with another number takes that"
    assert [start.actor_trains(step) for step in range(5)] == [False, False, False, True, True]
    assert [start.check(step) for step in range(5)] == [{}] * 5


def test_auto_waits_until_the_accuracy_holds():
    """Checked before steps 2, 4, 6, 8: passed, failed, passed, passed."""
    start = auto([0.7, 0.4, 0.6, 0.65])
    trained, held = [], []
    for step in range(10):
        metrics = start.check(step)
        held.append(metrics.get("critic/head_start/checks_held"))
        trained.append(start.actor_trains(step))
    assert trained == [False] * 8 + [True] * 2
    assert held == [None, None, 1, None, 0, None, 1, None, 2, None]
    assert start.first_actor_step == 8


def test_auto_ends_with_a_sentence_where_nothing_is_learned():
    start = auto([0.5, 0.55, 0.52], "critic.head_start.max_steps=6")
    for step in range(6):
        start.check(step)
    with pytest.raises(DiscriminatorCouldNotLearn) as error:
        start.check(6)
    for part in ("after 6 steps", "tells 0.52 of the pairs of 32", "accuracy=0.6", "critic.optim.lr=5e-06"):
        assert part in str(error.value)


def test_it_is_not_checked_any_more_once_it_is_over():
    start = auto([0.9, 0.9])
    for step in range(20):
        start.check(step)
    assert start.first_actor_step == 4


@pytest.mark.parametrize(("accuracy", "warns"), [(0.59, True), (0.62, False)])
def test_a_critic_that_guesses_is_spoken_of(caplog, accuracy, warns):
    """Two standard errors of .05 are .1."""
    start = HeadStart(config("trainer.critic_warmup=0"), lambda: HeldOutAccuracy(accuracy, 0.05, 32), 5)
    with caplog.at_level(logging.WARNING):
        start.warn_of_a_blind_critic()
    assert ("may be guessing" in caplog.text) == warns


def test_a_head_start_is_not_spoken_of(caplog):
    sft = ("trainer.warmup_use_sft=True", "trainer.critic_warmup=0")
    for settings in (("trainer.critic_warmup=5",), sft, ("trainer.val_only=True", "trainer.critic_warmup=0")):
        HeadStart(config(*settings), lambda: HeldOutAccuracy(0.3, 0.05, 32), 9).warn_of_a_blind_critic()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("held_out", "accuracy", "worked"),
    [(True, 0.559, False), (True, 0.6, True), (False, 0.599, False), (False, 0.6, True)],
)
def test_a_warmup_ends_with_a_verdict(caplog, accuracy, worked, held_out):
    """By held-out pairs, or where there are none by those of training."""
    start = HeadStart(config("trainer.critic_warmup=5"), None, 9)
    measure = (lambda: HeldOutAccuracy(accuracy, 0.04, 32)) if held_out else None
    with caplog.at_level(logging.INFO):
        start.conclude(measure, 0.1 if held_out else accuracy)
    (said,) = caplog.records
    assert (said.levelno == logging.INFO) == worked
    assert ("warmup worked" if worked else "warmup did not work") in caplog.text
    assert f"tells {accuracy:.3f} " in caplog.text and "critic.head_start.accuracy=0.6" in caplog.text
    assert ("pairs of 32 held-out prompts" if held_out else "training pairs") in caplog.text
    assert ("critic.optim.lr=5e-06 (5 to 10 times)" in caplog.text) != worked


@pytest.mark.parametrize(("accuracy", "error"), [(0.588, 0.03), (0.597, 0.003), (0.59, 0.04)])
def test_a_warmup_that_is_within_its_error_of_what_was_wanted_has_worked(caplog, accuracy, error):
    start = HeadStart(config("trainer.critic_warmup=5"), None, 9)
    with caplog.at_level(logging.INFO):
        start.conclude(lambda: HeldOutAccuracy(accuracy, error, 128), None)
    assert "warmup worked" in caplog.text and "accuracy=0.6 within that error: go on with GAD" in caplog.text


def test_a_warmup_that_may_be_guessing_has_not_worked(caplog):
    """By two standard errors, as GAD would say at its start."""
    HeadStart(config("trainer.critic_warmup=5"), None, 9).conclude(lambda: HeldOutAccuracy(0.61, 0.06, 6), None)
    assert "warmup did not work" in caplog.text and "which may be guessing" in caplog.text


def test_what_has_said_it_already_or_measured_nothing_has_no_verdict(caplog):
    auto([0.9]).conclude(lambda: HeldOutAccuracy(0.9, 0.01, 32), 0.9)
    HeadStart(config("trainer.critic_warmup=5"), None, 9).conclude(None, None)
    assert caplog.text == ""


def test_auto_that_fills_the_whole_run_has_failed_too():
    """Of five steps, 0 to 4, the last is checked also where none is due."""
    start = auto([0.5, 0.7], total_steps=4)
    assert [bool(start.check(step)) for step in range(3)] == [False, False, True]
    with pytest.raises(DiscriminatorCouldNotLearn, match="after 3 steps"):
        start.check(3)
    # The check that ended the run is made again when it goes on, and counts once.
    assert start.state() == {"first_actor_step": None, "head_start_held": 0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic.head_start.max_steps=3", "max_steps=3 ends before 2 checks every 5 steps are made: raise it to 10"),
        ("critic.head_start.accuracy=0.9", "accuracy=0.9 is not below critic.balance.highest=0.8"),
        ("critic.held_out_prompts=0", "looks at held-out pairs, and there are none"),
        ("trainer.warmup_use_sft=True", "freezes the actor, and trainer.warmup_use_sft=True trains it"),
        ("critic.balance.lowest=0.9", "lowest=0.9 must be below critic.balance.highest=0.8"),
    ],
)
def test_settings_that_contradict_each_other(override, message):
    with pytest.raises(ConfigError) as error:
        config("trainer.critic_warmup=auto", override)
    assert message in str(error.value)
