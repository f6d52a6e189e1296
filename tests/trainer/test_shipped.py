"""Settings that name what this package ships are checked without torch: what is taken for granted there holds."""

from __future__ import annotations

import inspect

import pytest
import torch

from verl.config.shipped import ADV_ESTIMATORS, DISCRIMINATOR_LOSSES, KL_PENALTIES, POLICY_LOSSES
from verl.trainer.config import ConfigError, compose_config, discriminator_checks
from verl.trainer.config.discriminator_checks import _is_as_shipped, _loss_problem
from verl.trainer.config.number_checks import LARGEST
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    DISCRIMINATOR_LOSS_REGISTRY,
    POLICY_LOSS_REGISTRY,
    kl_penalty,
    kl_penalty_forward,
)

GAD = (
    "stage=gad", "trainer.device=cpu", "trainer.experiment_name=x", "data.train_files=/d", "critic.model.path=/c",
    "actor_rollout_ref.model.path=/m",
)  # fmt: skip


def own(registry):
    """The names that this package registers, whatever tests beside this one do."""
    functions = {name: getattr(entry, "fn", entry) for name, entry in registry.items()}
    return {name for name, function in functions.items() if function.__module__.startswith("verl.")}


def test_the_names_are_those_that_are_registered():
    assert own(ADV_ESTIMATOR_REGISTRY) == ADV_ESTIMATORS
    assert own(POLICY_LOSS_REGISTRY) == POLICY_LOSSES
    assert own(DISCRIMINATOR_LOSS_REGISTRY) == DISCRIMINATOR_LOSSES


def test_every_policy_loss_takes_the_engines_weights():
    for name in POLICY_LOSSES:
        assert "rollout_is_weights" in inspect.signature(POLICY_LOSS_REGISTRY[name]).parameters


def test_every_kl_penalty_is_one():
    zeros = torch.zeros(1, 1)
    for name in KL_PENALTIES:
        assert kl_penalty(zeros, zeros, name).shape == kl_penalty(zeros, zeros, f"{name}+").shape == (1, 1)
    with pytest.raises(NotImplementedError):
        kl_penalty_forward(zeros, zeros, "full")


def test_the_largest_number_is_torchs():
    assert torch.finfo(torch.float32).max == LARGEST


@pytest.mark.parametrize("loss", sorted(DISCRIMINATOR_LOSSES))
def test_a_loss_as_it_is_shipped_would_pass_its_trial(loss):
    settings = compose_config([*GAD, f"critic.discriminator.loss={loss}"]).critic.discriminator
    assert _is_as_shipped(settings)
    assert _loss_problem(DISCRIMINATOR_LOSS_REGISTRY[loss].fn, settings.constants()) is None


def test_any_other_is_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(discriminator_checks, "_loss_problem", lambda fn, constants: f"tried with {constants}")
    compose_config(list(GAD))
    with pytest.raises(ConfigError, match=r"tried with \{'margin': 1\.5, "):
        compose_config([*GAD, "critic.discriminator.loss=hinge", "critic.discriminator.hinge.margin=1.5"])
    (tmp_path / "mine.py").write_text("def loss(scores):\n    return scores.difference.mean(), {}\n")
    with pytest.raises(ConfigError, match=r"tried with \{\}"):
        compose_config([*GAD, f"critic.discriminator.loss={tmp_path}/mine.py:loss"])
