"""Importance weights against numbers worked out by hand."""

import math

import pytest
import torch

from verl.trainer.ppo.engine_correction import truncated_importance_weights

LOG_2, LOG_3 = math.log(2), math.log(3)


def test_importance_weights_of_tokens():
    # Ratios 1, 3, 1/2 and, behind the end, 8. Three counts as two; the half is not below a half.
    weights, metrics = truncated_importance_weights(
        torch.tensor([[0.0, LOG_3, -1.0, 1.0]]), torch.tensor([[0.0, 0.0, LOG_2 - 1, 1 - 3 * LOG_2]]),
        torch.tensor([[1, 1, 1, 0]]), "token", 2.0,
    )  # fmt: skip
    torch.testing.assert_close(weights, torch.tensor([[1, 2, 0.5, 0]]))
    assert metrics == pytest.approx(
        {
            "rollout_corr/rollout_is_mean": 3.5 / 3,
            "rollout_corr/rollout_is_std": math.sqrt((1 + 4 + 0.25) / 3 - (3.5 / 3) ** 2),
            "rollout_corr/rollout_is_min": 0.5,
            "rollout_corr/rollout_is_max": 2,
            "rollout_corr/rollout_is_ratio_fraction_high": 1 / 3,
            "rollout_corr/rollout_is_ratio_fraction_low": 0,
            "rollout_corr/rollout_is_eff_sample_size": 3.5**2 / (1 + 4 + 0.25) / 3,
        }
    )


def test_importance_weights_of_answers():
    # Products 2 * 1/4 = 1/2, 3 * 1 = 3, and of an answer without tokens, which does not count.
    ours = torch.tensor([[[LOG_2, 0.0], [LOG_3, 0.0], [5.0, 5.0]]], requires_grad=True)
    engine = torch.tensor([[[0.0, 2 * LOG_2], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[[1, 1], [1, 1], [0, 0]]])
    weights, metrics = truncated_importance_weights(ours, engine, mask, "sequence", 1.5)
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5], [1.5, 1.5], [0, 0]]]))
    assert not weights.requires_grad
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"] == pytest.approx(0.5)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_low"] == pytest.approx(0.5)  # 1/2 is below 1/1.5
