"""DPO against numbers worked out by hand."""

import math

import pytest
import torch

from verl.trainer.ppo.core_algos import compute_preference_loss


def log_probs(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_loss_and_metrics_by_hand():
    """beta 0.5; log-ratios 2 and -1, 0 and 4: rewards 1 and -0.5, 0 and 2; margins 1.5 and -2."""
    loss, metrics = compute_preference_loss(
        log_probs(-10.0, -7.0), log_probs(-21.0, -3.0), log_probs(-12.0, -7.0), log_probs(-20.0, -7.0), beta=0.5
    )
    expected = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(2.0))) / 2
    assert loss.item() == pytest.approx(expected)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "actor/soda_loss": expected,
            "actor/soda_acc": 0.5,
            "actor/soda_margin": -0.25,
            "actor/soda_chosen_reward": 0.5,
            "actor/soda_rejected_reward": 0.75,
        }
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_at_the_reference_the_loss_is_log_2_and_nothing_is_preferred():
    loss, metrics = compute_preference_loss(*(log_probs(-3.0, -50.0) for _ in range(4)), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["actor/soda_acc"] == 0 and metrics["actor/soda_margin"] == 0


def test_gradient_by_hand():
    """d loss / d chosen = -beta * sigmoid(-margin) / pairs, and the opposite for the rejected (eq. 7's gradient)."""
    chosen, rejected = log_probs(-1.0, -1.0), log_probs(-2.0, -9.0)
    compute_preference_loss(chosen, rejected, log_probs(-1.0, -3.0), log_probs(-2.0, -5.0), beta=0.5)[0].backward()
    # Margins 0 and 0.5 * (2 + 4) = 3.
    expected = torch.tensor([-0.5 * 0.5 / 2, -0.5 / (1 + math.exp(3.0)) / 2], dtype=torch.float64)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_margins_of_any_size_have_a_finite_loss():
    loss, _ = compute_preference_loss(
        log_probs(0.0, -1e5), log_probs(-1e5, 0.0), log_probs(0.0, 0.0), log_probs(0.0, 0.0), 1.0
    )
    assert loss.item() == pytest.approx(5e4)
