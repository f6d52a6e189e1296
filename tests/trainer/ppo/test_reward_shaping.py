"""Rewards on their way to advantages, with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from verl.batch import Answers, LogProbs, ReferenceLogProbs, Rewards, table
from verl.config.run import AlgorithmConfig
from verl.trainer.config import compose_config
from verl.trainer.ppo.core_algos import AdaptiveKLController, FixedKLController
from verl.trainer.ppo.reward import compute_advantage, on_last_token, reward_answers
from verl.trainer.ppo.reward_shaping import flat_groups, settle_cut_answers, without_length

EOS = 9
REWARDS = torch.tensor([[3.0, 1.0, 2.0], [0.5, -1.0, 4.0], [1.0, 2.0, 3.0]])
D = ((1 + 79 / 12 + 1) / 3) ** 0.5
CUT = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])


@pytest.mark.parametrize(
    ("mode", "rewards", "left_out"),
    [
        ("keep", [[3, 1, 2], [0.5, -1, 4], [1, 2, 3]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("leave_out", [[3, 1, 2], [0.5, -1, 4], [1, 2, 3]], [[1, 0, 0], [0, 1, 1], [1, 1, 1]]),
        # The lowest complete answers are worth 1 and .5. Variances within groups are 1, 79 / 12 (deviations from 7 / 6:
        # -4 / 6, -13 / 6, 17 / 6) and 1. A cut answer that is lower stays where it is; the third group has no
        # complete answer.
        ("lowest", [[1 - D, 1, 2], [0.5, 0.5 - D, 0.5 - D], [1, 2, 3]], [[0, 0, 0], [0, 0, 0], [1, 1, 1]]),
    ],
)
def test_cut_answers(mode, rewards, left_out):
    settled, out = settle_cut_answers(REWARDS, CUT, mode)
    torch.testing.assert_close(settled[:2], torch.tensor(rewards[:2]).float())
    low = settle_cut_answers(REWARDS - 9.0 * CUT, CUT, "lowest")[0]
    assert mode != "lowest" or low[0, 0] == 3 - 9
    assert out.long().tolist() == left_out


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown cut_answers 'drop': use one of keep, lowest, leave_out"):
        settle_cut_answers(REWARDS, CUT, "drop")


def test_what_goes_with_length_is_taken_out_within_groups():
    """Two groups of lengths (1, 2, 3) and (10, 20, 30) with rewards (1, 3, 2) and (5, 4, 0).

    Centred: lengths (-1, 0, 1), (-10, 0, 10); rewards (-1, 1, 0), (2, 1, -3). Slope (1 + 0 + 0 - 20 + 0 - 30) / (2 +
    200) = -49 / 202.
    """
    rewards, lengths = torch.tensor([[1.0, 3, 2], [5, 4, 0]]), torch.tensor([[1, 2, 3], [10, 20, 30]])
    corrected, slope = without_length(rewards, lengths, torch.ones(2, 3, dtype=torch.bool))
    k = 49 / 202
    assert slope.item() == pytest.approx(-k)
    assert corrected.tolist() == [pytest.approx([1 - k, 3, 2 + k]), pytest.approx([5 - 10 * k, 4, 10 * k])]


def test_only_counted_answers_make_the_slope():
    """Of lengths (1, 3, 100) the last is not counted: slope (-1 * -1 + 1 * 1) / 2 = 1, from the mean length 2."""
    rewards, lengths = torch.tensor([[2.0, 4.0, 50.0]]), torch.tensor([[1, 3, 100]])
    corrected, slope = without_length(rewards, lengths, torch.tensor([[True, True, False]]))
    assert slope.item() == 1.0
    assert corrected.tolist() == [[3.0, 3.0, 50.0 - 98.0]]


def test_a_group_of_which_nothing_counts_stays_as_it_is():
    rewards, lengths = torch.tensor([[2.0, 4.0], [7.0, 8.0]]), torch.tensor([[1, 3], [9, 9]])
    corrected, slope = without_length(rewards, lengths, torch.tensor([[True, True], [False, False]]))
    assert slope.item() == 1.0 and corrected.tolist() == [[3.0, 3.0], [7.0, 8.0]]


def test_equal_lengths_correct_nothing():
    rewards = torch.tensor([[1.0, 5.0]])
    corrected, slope = without_length(rewards, torch.tensor([[7, 7]]), torch.ones(1, 2, dtype=torch.bool))
    assert slope.item() == 0.0 and torch.equal(corrected, rewards)


def test_flat_groups():
    """Standard deviations 1, .1 and, of the two answers that are not left out, sqrt(2) / 2; one answer has none."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.1, 1.2], [0.0, 1.0, 9.0], [1.0, 2.0, 3.0]])
    left_out = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0]]).bool()
    assert flat_groups(rewards, left_out, 0.5).flatten().tolist() == [False, True, False, True]
    assert flat_groups(rewards, left_out, 0.8).flatten().tolist() == [False, True, True, True]
    assert flat_groups(rewards, left_out, 0.0).flatten().tolist() == [False, False, False, True]


SCORES = torch.tensor([[1.0, 7.0, 3.0], [0.1, 0.2, 0.15]])


def answered() -> Answers:
    """Two prompts with three answers of up to four tokens; the second answer to the first prompt was cut."""
    first, second = [[5, EOS, 0, 0], [5, 5, 5, 5], [5, 5, EOS, 0]], [[EOS, 0, 0, 0], [5, EOS, 0, 0], [5, 5, 5, 5]]
    responses = torch.tensor([first, second])
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]])
    return Answers(responses, mask)


def algorithm(**changes):
    config = compose_config(["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"])
    return replace(config.algorithm, norm_adv_by_std_in_grpo=False, **changes)


def rewarded(settings: AlgorithmConfig, task=None, eos=EOS, answers=None, controller=None, **more):
    """`reward_answers` with the scores above: the rewards and the metrics."""
    controller = controller or FixedKLController(0.0)
    return reward_answers(answers or answered(), SCORES, settings, controller, task, eos, **more)


def advantages(rewards: Rewards) -> list[list[float]]:
    return rewards.advantages[..., 0].tolist()


def test_cut_answers_as_they_stand_can_win():
    rewards, metrics = rewarded(algorithm(cut_answers="keep"))
    # Group means 11 / 3 and .15.
    assert advantages(rewards) == [
        pytest.approx([-8 / 3, 10 / 3, -2 / 3], abs=1e-6),
        pytest.approx([-0.05, 0.05, 0], abs=1e-6),
    ]
    assert metrics["response_length/cut_ratio"] == pytest.approx(2 / 6)
    assert metrics["critic/advantages/cut_mean"] == pytest.approx(5 / 3)
    assert metrics["critic/left_out_frac"] == 0.0


def test_an_answer_that_ends_in_another_eos_is_not_cut():
    answers, other = answered(), 97
    answers = replace(answers, responses=answers.responses.masked_fill(answers.responses == EOS, other))
    assert rewarded(algorithm(), answers=answers)[1]["response_length/cut_ratio"] == 1.0
    expected, expected_metrics = rewarded(algorithm())
    rewards, metrics = rewarded(algorithm(), answers=answers, eos=(EOS, other))
    assert metrics == expected_metrics
    assert advantages(rewards) == advantages(expected)


def test_a_cut_answer_is_never_above_its_groups_complete_ones_by_default():
    rewards, metrics = rewarded(algorithm())
    # Variances within groups 28 / 3 and .0025. Rewards (1, 1 - d, 3) and (.1, .2, .1 - d), with these means.
    d = ((28 / 3 + 0.0025) / 2) ** 0.5
    first, second = (5 - d) / 3, (0.4 - d) / 3
    assert advantages(rewards) == [
        pytest.approx([1 - first, 1 - d - first, 3 - first], abs=1e-5),
        pytest.approx([0.1 - second, 0.2 - second, 0.1 - d - second], abs=1e-5),
    ]
    assert metrics["critic/advantages/cut_mean"] == pytest.approx((1 - d - first + 0.1 - d - second) / 2)


def test_answers_left_out_have_no_advantage_and_do_not_move_the_others():
    changes = {"cut_answers": "leave_out", "min_group_std": 0.2}
    rewards, metrics = rewarded(algorithm(**changes))
    # The second group's complete answers spread by .07 only.
    assert advantages(rewards) == [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert metrics["critic/left_out_frac"] == pytest.approx(4 / 6)
    assert metrics["critic/flat_group_frac"] == 0.5


def test_length_correction_uses_complete_answers_and_comes_before_cut_ones_are_settled():
    rewards, metrics = rewarded(algorithm(length_correction=True))
    # Complete answers have lengths (2, 3) and (1, 2), rewards (1, 3) and (.1, .2): slope (.5 * 2 + .5 * .1) / 1 = 1.05.
    assert metrics["critic/length_slope"] == pytest.approx(1.05)
    sums = rewards.token_level_scores.sum(-1).tolist()
    # 1 + .525, 3 - .525, .1 + .525, .2 - .525; the cut ones, 7 - 1.5 * 1.05 and .15 - 2.5 * 1.05, are settled then.
    corrected = torch.tensor([[1.525, 5.425, 2.475], [0.625, -0.325, 0.15 - 2.625]])
    d = corrected.var(-1).mean().sqrt().item()
    assert sums == [pytest.approx([1.525, 1.525 - d, 2.475]), pytest.approx([0.625, -0.325, 0.15 - 2.625])]
    assert "critic/length_reward_corr_used" in metrics


def test_the_task_reward_is_part_of_what_is_compared():
    task = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    weighted = algorithm(task_reward_weight=0.5, cut_answers="keep")
    rewards, metrics = rewarded(weighted, task)
    assert rewards.token_level_scores.sum(-1)[0].tolist() == [3.0, 7.0, 3.0]
    assert metrics["critic/task_reward/max"] == 4.0


def test_the_kl_coefficient_rests_while_the_actor_is_frozen():
    zeros = torch.zeros((*SCORES.shape, 4))
    log_probs = {"old": LogProbs(zeros, zeros), "reference": ReferenceLogProbs(zeros)}
    controller = AdaptiveKLController(0.5, target_kl=0.1, horizon=100)
    settings = algorithm(use_kl_in_reward=True)
    rewarded(settings, controller=controller, **log_probs, kl_adapts=False)
    assert controller.value == 0.5
    rewarded(settings, controller=controller, **log_probs)
    # A KL of 0 is an error of -1, limited to -.2; six answers of a horizon of 100.
    assert controller.value == pytest.approx(0.5 * (1 - 0.2 * 6 / 100))


def test_advantages_are_asked_for_with_the_established_arguments():
    data = table(answered())
    data.batch["token_level_rewards"] = on_last_token(SCORES, data.batch["response_mask"])
    compute_advantage(data, "grpo", gamma=1.0, lam=1.0, num_repeat=3, norm_adv_by_std_in_grpo=False, config=algorithm())
    first = data.batch["advantages"][0, :, 0].tolist()
    assert first == pytest.approx([-8 / 3, 10 / 3, -2 / 3], abs=1e-6)  # around 11 / 3
    with pytest.raises(ValueError, match="num_repeat=2, but there are 3 answers"):
        compute_advantage(data, "grpo", num_repeat=2)
