"""Losses, advantages and KL against numbers worked out by hand, or against plain formulas written here."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from verl.trainer.ppo import core_algos as ca

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def constants(clip=0.2, low=None, high=None, c=3.0):
    return SimpleNamespace(clip_ratio=clip, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=c)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


@pytest.fixture
def registries():
    """What a test registers is gone after it."""
    tables = (ca.ADV_ESTIMATOR_REGISTRY, ca.POLICY_LOSS_REGISTRY, ca.DISCRIMINATOR_LOSS_REGISTRY)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


# ---- aggregation

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 7 / 3),  # (1 + 2 + 4) / 3 tokens
        ("seq-mean-token-sum", 3.5),  # (3 + 4) / 2 sequences
        ("seq-mean-token-mean", 2.75),  # (3 / 2 + 4 / 1) / 2
        ("seq-mean-token-sum-norm", 7 / 6),  # (3 / 3 + 4 / 3) / 2, T = 3
    ],
)
def test_agg_loss_by_hand(mode, expected):
    assert ca.agg_loss(LOSS, MASK, mode).item() == pytest.approx(expected)
    assert ca.agg_loss(LOSS, MASK.bool(), mode).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 0.5),  # 7 / 14 tokens
        ("seq-mean-token-sum", 1.75),  # 7 / 4 sequences
        ("seq-mean-token-mean", 1.375),  # 5.5 / 4
        ("seq-mean-token-sum-norm", 7 / 12),  # (7 / 3) / 4
    ],
)
def test_agg_loss_takes_the_totals_of_the_mini_batch(mode, expected):
    totals = {"batch_num_tokens": 14, "global_batch_size": 4}
    assert ca.agg_loss(LOSS, MASK, mode, **totals).item() == pytest.approx(expected)
    # Gradients are averaged over ranks, so a rank's share is scaled up by their number.
    assert ca.agg_loss(LOSS, MASK, mode, dp_size=3, **totals).item() == pytest.approx(3 * expected)


def test_agg_loss_scale_factor():
    # (3 / 10 + 4 / 10) / 2
    assert ca.agg_loss(LOSS, MASK, "seq-mean-token-sum-norm", loss_scale_factor=10).item() == pytest.approx(0.35)


def test_agg_loss_row_without_a_token_counts_as_zero():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    # (3 / 2 + 0) / 2
    assert ca.agg_loss(LOSS, mask, "seq-mean-token-mean").item() == pytest.approx(0.75)


def whole_by_loops(loss, mask, mode):
    """The four definitions, a row at a time."""
    sums = [sum(x for x, m in zip(xs, ms, strict=True) if m) for xs, ms in zip(loss, mask, strict=True)]
    counts = [int(ms.sum()) for ms in mask]
    if mode == "token-mean":
        return sum(sums) / sum(counts)
    if mode == "seq-mean-token-mean":
        sums = [s / c for s, c in zip(sums, counts, strict=True)]
    if mode == "seq-mean-token-sum-norm":
        sums = [s / loss.shape[1] for s in sums]
    return sum(sums) / len(sums)


@pytest.mark.parametrize("mode", MODES)
def test_agg_loss_is_the_same_for_every_split(mode):
    generator = torch.Generator().manual_seed(0)
    loss = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    whole = whole_by_loops(loss, mask, mode)
    (whole_grad,) = torch.autograd.grad(whole, loss)

    # Two ranks; rank 0 holds rows 0..3 in micro-batches of 1 and 3 rows, rank 1 rows 4 and 5 one by one.
    parts = [[[0], [1, 2, 3]], [[4], [5]]]
    totals = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": 6}
    shares = sum(ca.agg_loss(loss[index], mask[index], mode, **totals) for rank in parts for index in rank) / 2
    (grad,) = torch.autograd.grad(shares, loss)
    assert shares.item() == pytest.approx(whole.item())
    torch.testing.assert_close(grad, whole_grad)


def test_agg_loss_errors():
    with pytest.raises(ValueError, match=r"'mean'.*token-mean, seq-mean-token-sum"):
        ca.agg_loss(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match=r"2 ranks.*batch_num_tokens"):
        ca.agg_loss(LOSS, MASK, "token-mean", dp_size=2, global_batch_size=4)
    for mode in MODES[1:]:
        with pytest.raises(ValueError, match=r"2 ranks.*global_batch_size"):
            ca.agg_loss(LOSS, MASK, mode, dp_size=2, batch_num_tokens=14)


# ---- GRPO


def outcome(scores, width=3):
    """Each score on the last of `width` tokens."""
    rewards = torch.zeros(len(scores), width, dtype=torch.float64)
    rewards[:, -1] = torch.tensor(scores, dtype=torch.float64)
    return rewards, torch.ones(len(scores), width)


def test_grpo_interleaved_groups():
    # a: 1, 2, 3: mean 2, unbiased std sqrt((1 + 0 + 1) / 2) = 1.  b: 10, 14: mean 12, std sqrt((4 + 4) / 1) = 2.8284.
    rewards, mask = outcome([1, 10, 2, 14, 3])
    advantages, returns = ca.compute_grpo_outcome_advantage(rewards, mask, ["a", "b", "a", "b", "a"], epsilon=0.0)
    half = 2 / math.sqrt(8)
    expected = torch.tensor([-1, -half, 0, half, 1], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected[:, None].expand(5, 3))
    torch.testing.assert_close(returns, advantages)


def test_grpo_without_std():
    rewards, mask = outcome([1, 10, 2, 14, 3])
    advantages, _ = ca.compute_grpo_outcome_advantage(
        rewards, mask, np.array(["a", "b", "a", "b", "a"], dtype=object), norm_adv_by_std_in_grpo=False
    )
    assert advantages[:, 0].tolist() == [-1, -2, 0, 2, 1]


def test_grpo_epsilon_is_added_to_the_std():
    # (1 - 2) / (1 + 1) = -0.5
    rewards, mask = outcome([1, 2, 3])
    advantages, _ = ca.compute_grpo_outcome_advantage(rewards, mask, [0, 0, 0], epsilon=1.0)
    assert advantages[:, 0].tolist() == [-0.5, 0, 0.5]


@pytest.mark.parametrize("norm", [True, False])
def test_grpo_group_of_one_has_no_advantage(norm):
    rewards, mask = outcome([5, 1, 3])
    advantages, _ = ca.compute_grpo_outcome_advantage(
        rewards, mask, ["alone", "b", "b"], norm_adv_by_std_in_grpo=norm, epsilon=0.1
    )
    assert advantages[0].tolist() == [0, 0, 0]
    # The others: 1 and 3 around 2, with std sqrt(2) if it is used.
    assert advantages[2, 0].item() == pytest.approx(1 / (math.sqrt(2) + 0.1) if norm else 1)


@pytest.mark.parametrize(("score", "n"), [(0.5, 4), (0.1, 8), (100.7, 3)])
def test_grpo_equal_scores_have_no_advantage(score, n):
    # All answers alike: score - mean is 0, whatever the rounding of a sum of n copies.
    advantages, _ = ca.compute_grpo_outcome_advantage(torch.full((n, 1), score), torch.ones(n, 1), [0] * n)
    assert advantages.abs().max().item() == 0.0


def test_grpo_mask():
    # Row 0 scores 1 + 2 (the 100 is outside its mask), row 1 scores 5: mean 4, advantages -1 and 1.
    rewards = torch.tensor([[1.0, 2.0, 100.0], [0.0, 0.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages, _ = ca.compute_grpo_outcome_advantage(rewards, mask, ["x", "x"], norm_adv_by_std_in_grpo=False)
    assert advantages.tolist() == [[-1, -1, 0], [1, 1, 1]]


# ---- PPO

# Six tokens that take every branch, clip 0.2, c 3.
RATIOS = [1.1, 1.5, 0.5, 0.5, 1.5, 4.0]
ADVANTAGES = [1, 1, 1, -1, -1, -1]


def vanilla(ratios, advantages, config, mode="token-mean", mask=None, **more):
    log_prob = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    mask = torch.ones_like(log_prob) if mask is None else mask
    loss, metrics = ca.compute_policy_loss_vanilla(
        torch.zeros_like(log_prob), log_prob, row(*advantages), mask, mode, config, **more
    )
    (grad,) = torch.autograd.grad(loss, log_prob)
    return loss.item(), {name: value.item() for name, value in metrics.items()}, grad[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.1, 1, -1.1, -1.1),  # inside: -A r, and d(-A r)/d log r = -A r
        (1.5, 1, -1.2, 0.0),  # a gain beyond 1.2 counts no further
        (0.5, 1, -0.5, -0.5),  # a loss is never clipped away
        (0.5, -1, 0.8, 0.0),  # clipped low
        (1.5, -1, 1.5, 1.5),
        (4.0, -1, 3.0, 0.0),  # dual clip: at most c |A|
        (1.0, 0, 0.0, 0.0),
    ],
)
def test_vanilla_each_branch(ratio, advantage, expected, slope):
    loss, _, grad = vanilla([ratio], [advantage], constants())
    assert loss == pytest.approx(expected)
    assert grad == pytest.approx([slope])


def test_vanilla_mean_and_metrics():
    loss, metrics, grad = vanilla(RATIOS, ADVANTAGES, constants())
    # (-1.1 - 1.2 - 0.5 + 0.8 + 1.5 + 3.0) / 6
    assert loss == pytest.approx(2.5 / 6)
    # Clipped: tokens 1 and 3. Capped: token 5. KL: minus the mean log-ratio, and the product of the ratios is 2.475.
    assert metrics == pytest.approx(
        {"actor/pg_clipfrac": 2 / 6, "actor/pg_clipfrac_lower": 1 / 6, "actor/ppo_kl": -math.log(2.475) / 6}
    )
    assert grad == pytest.approx([x / 6 for x in (-1.1, 0, -0.5, 0, 1.5, 0)])


def test_vanilla_mask_and_aggregation():
    # Tokens 1 and 4 masked: (-1.1 - 0.5 + 0.8 + 3.0) / 4; clipped of those: token 3 alone.
    mask = row(1, 0, 1, 1, 0, 1)
    loss, metrics, grad = vanilla(RATIOS, ADVANTAGES, constants(), mask=mask)
    assert loss == pytest.approx(2.2 / 4)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(1 / 4)
    assert grad[1] == grad[4] == 0
    # The sum over the one sequence: 2.2; as the share of 8 sequences: 2.2 / 8.
    assert vanilla(RATIOS, ADVANTAGES, constants(), "seq-mean-token-sum", mask)[0] == pytest.approx(2.2)
    assert vanilla(RATIOS, ADVANTAGES, constants(), "seq-mean-token-sum", mask, global_batch_size=8)[
        0
    ] == pytest.approx(2.2 / 8)


def test_vanilla_asymmetric_clip():
    # low 0.1, high 0.3: 1.5 is clipped to 1.3, 0.5 to 0.9; clip_ratio itself is not looked at.
    loss, metrics, _ = vanilla([1.5, 0.5], [1, -1], constants(clip=0.0, low=0.1, high=0.3))
    assert loss == pytest.approx((-1.3 + 0.9) / 2)
    assert metrics["actor/pg_clipfrac"] == 1.0
    # A limit of 0 is a limit, not "unset".
    assert vanilla([1.5, 0.5], [1, -1], constants(clip=0.2, low=0.0, high=0.0))[0] == pytest.approx((-1 + 1) / 2)


def test_vanilla_rollout_weights_multiply_the_token_losses():
    # -1.1 * 2 and 0.8 * 0.5
    loss, _, _ = vanilla([1.1, 0.5], [1, -1], constants(), rollout_is_weights=row(2, 0.5))
    assert loss == pytest.approx((-2.2 + 0.4) / 2)


def test_vanilla_survives_a_huge_ratio():
    loss, _, _ = vanilla([1e300], [-1], constants())
    assert loss == pytest.approx(3.0)


def test_vanilla_refuses_a_dual_clip_of_one():
    with pytest.raises(ValueError, match=r"clip_ratio_c.*1\.0"):
        vanilla([1.0], [1], constants(c=1.0))


def test_compute_policy_loss_returns_four():
    old = torch.zeros(1, 6, dtype=torch.float64)
    loss, clipfrac, kl, lower = ca.compute_policy_loss(old, row(*RATIOS).log(), row(*ADVANTAGES), torch.ones(1, 6))
    assert loss.item() == pytest.approx(2.5 / 6)
    assert clipfrac.item() == pytest.approx(2 / 6)
    assert kl.item() == pytest.approx(-math.log(2.475) / 6)
    assert lower.item() == pytest.approx(1 / 6)
    # Low 0.1, high 0.3, c 2: (-1.1 - 1.3 - 0.5 + 0.9 + 1.5 + 2.0) / 6
    loss, *_ = ca.compute_policy_loss(
        old, row(*RATIOS).log(), row(*ADVANTAGES), torch.ones(1, 6), 0.2, 0.1, 0.3, 2.0, "token-mean"
    )
    assert loss.item() == pytest.approx(1.5 / 6)


# ---- GSPO


def gspo(log_ratios, advantages, mask=None, clip=0.1, low=None, high=None, **more):
    """Loss and metrics for rows of log-ratios (R, T) with one advantage per row."""
    log_prob = torch.tensor(log_ratios, dtype=torch.float64)
    mask = torch.ones_like(log_prob) if mask is None else torch.tensor(mask)
    advantages = torch.tensor(advantages, dtype=torch.float64)[:, None] * mask
    loss, metrics = ca.compute_policy_loss_gspo(
        torch.zeros_like(log_prob),
        log_prob,
        advantages,
        mask,
        more.pop("mode", "token-mean"),
        constants(clip, low, high),
        **more,
    )
    return loss.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("log_ratios", "advantage", "expected", "clipped"),
    [
        ([0.3, 0.1], 1, -1.1, 1),  # mean 0.2: r = e^0.2 = 1.2214, clipped high
        ([0.3, 0.1], -1, math.exp(0.2), 0),  # the worse of the two is kept
        ([-0.3, -0.1], -1, 0.9, 1),  # r = e^-0.2 = 0.8187, clipped low
        ([-0.3, -0.1], 1, -math.exp(-0.2), 0),
        ([1.0, -0.9], 2, -2 * math.exp(0.05), 0),  # big tokens that cancel: r = e^0.05 is inside
    ],
)
def test_gspo_both_sides(log_ratios, advantage, expected, clipped):
    loss, metrics = gspo([log_ratios], [advantage])
    assert loss == pytest.approx(expected)
    assert metrics == pytest.approx(
        {
            "actor/pg_clipfrac": clipped,
            "actor/pg_clipfrac_lower": 0,
            "actor/ppo_kl": -sum(log_ratios) / 2,
        }
    )


def test_gspo_asymmetric_clip():
    # High 0.3 lets e^0.2 through, low 0.05 clips 0.8187 to 0.95: (-1.2214 + 0.95) / 2
    loss, _ = gspo([[0.3, 0.1], [-0.3, -0.1]], [1, -1], low=0.05, high=0.3)
    assert loss == pytest.approx((-math.exp(0.2) + 0.95) / 2)


def test_gspo_sequence_length_does_not_matter():
    # Row 0 has one token, row 1 four, both of log-ratio 0.05: each weighs one half, under every mode.
    ratios, mask = [[0.05, 9, 9, 9], [0.05] * 4], [[1, 0, 0, 0], [1, 1, 1, 1]]
    for mode in MODES:
        assert gspo(ratios, [3, -1], mask, mode=mode)[0] == pytest.approx((-3 + 1) * math.exp(0.05) / 2)
    # As the share of a mini-batch of 10 sequences on 2 ranks.
    loss, _ = gspo(ratios, [3, -1], mask, dp_size=2, global_batch_size=10)
    assert loss == pytest.approx((-3 + 1) * math.exp(0.05) / 10 * 2)


def test_gspo_clip_fraction_counts_tokens():
    # Row 0 (two tokens) is clipped, row 1 (one token) is not.
    _, metrics = gspo([[0.2, 0.2], [0.0, 7.0]], [1, 1], [[1, 1], [1, 0]])
    assert metrics["actor/pg_clipfrac"] == pytest.approx(2 / 3)
    assert metrics["actor/ppo_kl"] == pytest.approx(-0.4 / 3)


def test_gspo_overflow_cap():
    # exp(1000) would be inf; the log-ratio is capped at 10.
    loss, _ = gspo([[1000.0, 1000.0]], [-1])
    assert loss == pytest.approx(math.exp(10))
    assert gspo([[9.0, 9.0]], [-1])[0] == pytest.approx(math.exp(9))


def gspo_by_scalars(old, new, advantages, lengths, low, high):
    """-min(r A, clip(r) A) per sequence, averaged over sequences; r = exp(mean log-ratio)."""
    total = 0.0
    for i, length in enumerate(lengths):
        ratio = torch.exp(sum(new[i, t] - old[i, t] for t in range(length)) / length)
        limited = ratio if 1 - low <= ratio <= 1 + high else ratio.detach().clamp(1 - low, 1 + high)
        total = total - torch.min(ratio * advantages[i], limited * advantages[i])
    return total / len(lengths)


def test_gspo_gradient_equals_the_scalar_formula():
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    lengths = [6, 1, 2, 3, 4, 5, 6, 2, 3, 1, 5, 4]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    noise = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    new = (old + 0.3 * noise).requires_grad_()

    expected = gspo_by_scalars(old, new, advantages, lengths, 0.1, 0.2)
    loss, metrics = ca.compute_policy_loss_gspo(
        old, new, advantages[:, None].expand(12, 6), mask, "token-mean", constants(low=0.1, high=0.2)
    )
    assert 0 < metrics["actor/pg_clipfrac"] < 1, "the case must have clipped and unclipped sequences"
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0])


# ---- SFT and entropy


@pytest.mark.parametrize("seed", [0, 1])
def test_sft_is_torch_cross_entropy(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    expected = F.cross_entropy(logits.transpose(1, 2), labels.masked_fill(~mask, -100), ignore_index=-100)

    log_prob = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    loss = ca.compute_sft_loss(log_prob, mask)
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_sft_modes_and_totals():
    log_prob, mask = -LOSS, MASK
    # The same sums as in the aggregation tests: 5.5 / 2 and 7 / 14.
    assert ca.compute_sft_loss(log_prob, mask, "seq-mean-token-mean").item() == pytest.approx(2.75)
    assert ca.compute_sft_loss(log_prob, mask, batch_num_tokens=14).item() == pytest.approx(0.5)


def test_entropy_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert ca.compute_entropy_loss(logits, MASK).item() == pytest.approx(entropy[MASK.bool()].mean().item())
    # Uniform over 8: log 8; certain: 0. Their mean over one token each.
    two = torch.stack([torch.zeros(8), torch.tensor([1000.0] + [0.0] * 7)])[None]
    assert ca.compute_entropy_loss(two, torch.ones(1, 2)).item() == pytest.approx(math.log(8) / 2)


# ---- KL

# actor - reference: 0.5 and -1
LOGPROB, REFERENCE = row(-1.0, -3.0), row(-1.5, -2.0)
KINDS = {
    "k1": [0.5, -1.0],
    "abs": [0.5, 1.0],
    "k2": [0.125, 0.5],  # half the square
    "k3": [math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1],  # e^-d + d - 1: 0.1065 and 0.7183
}
SLOPES = {
    "k1": [1.0, 1.0],
    "abs": [1.0, -1.0],
    "k2": [0.5, -1.0],
    "k3": [1 - math.exp(-0.5), 1 - math.e],
}
SYNONYMS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


@pytest.mark.parametrize("kind", [*KINDS, *SYNONYMS])
def test_kl_penalty_values_and_gradients(kind):
    logprob = LOGPROB.clone().requires_grad_()
    name = SYNONYMS.get(kind, kind)
    value = ca.kl_penalty(logprob, REFERENCE, kind)
    assert value[0].tolist() == pytest.approx(KINDS[name])
    assert ca.kl_penalty_forward(LOGPROB, REFERENCE, kind)[0].tolist() == pytest.approx(KINDS[name])
    assert torch.autograd.grad(value.sum(), logprob)[0][0].tolist() == pytest.approx(SLOPES[name])


@pytest.mark.parametrize("kind", [*KINDS, *SYNONYMS])
def test_kl_penalty_plus_has_the_gradient_of_k2(kind):
    logprob = LOGPROB.clone().requires_grad_()
    value = ca.kl_penalty(logprob, REFERENCE, kind + "+")
    assert value[0].tolist() == pytest.approx(KINDS[SYNONYMS.get(kind, kind)])
    assert torch.autograd.grad(value.sum(), logprob)[0][0].tolist() == pytest.approx([0.5, -1.0])


def test_k3_clamps():
    # d = -30: the log-ratio 30 is held at 20 and the value at 10. d = 30: e^-20 + 20 - 1 = 19, held at 10.
    # d = 10.5: e^-10.5 + 9.5 is below 10 and stays. d = -1000 would overflow.
    value = ca.kl_penalty(row(-30, 30, 10.5, -1000), torch.zeros(1, 4, dtype=torch.float64), "k3")
    assert value[0].tolist() == pytest.approx([10, 10, 9.5 + math.exp(-10.5), 10])


@pytest.mark.parametrize("kind", ["full", "full+", "k4", ""])
def test_kl_penalty_unknown(kind):
    with pytest.raises(NotImplementedError, match=r"low_var_kl \(k3\)"):
        ca.kl_penalty(LOGPROB, REFERENCE, kind)


def test_fixed_controller():
    controller = ca.get_kl_controller(SimpleNamespace(type="fixed", kl_coef=0.3))
    controller.update(current_kl=100.0, n_steps=1000)
    assert controller.value == 0.3


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        (0.3, 0.102),  # error 2, held at 0.2: 0.1 * (1 + 0.2 * 100 / 1000)
        (0.11, 0.101),  # error 0.1: 0.1 * (1 + 0.1 * 0.1)
        (0.1, 0.1),
        (0.0, 0.098),  # error -1, held at -0.2
    ],
)
def test_adaptive_controller(current, expected):
    settings = SimpleNamespace(type="adaptive", kl_coef=0.1, target_kl=0.1, horizon=1000)
    controller = ca.get_kl_controller(settings)
    controller.update(current_kl=current, n_steps=100)
    assert controller.value == pytest.approx(expected)


def test_adaptive_controller_compounds():
    controller = ca.AdaptiveKLController(init_kl_coef=1.0, target_kl=1.0, horizon=10)
    for _ in range(2):
        controller.update(current_kl=5.0, n_steps=10)
    assert controller.value == pytest.approx(1.44)  # 1.2 * 1.2


@pytest.mark.parametrize("horizon", [0, -1, math.inf, math.nan])
def test_controller_refuses_a_horizon(horizon):
    with pytest.raises(ValueError, match="horizon"):
        ca.get_kl_controller(SimpleNamespace(type="adaptive", kl_coef=0.1, target_kl=0.1, horizon=horizon))


def test_controller_refuses_a_type():
    with pytest.raises(ValueError, match=r"'linear'.*fixed or adaptive"):
        ca.get_kl_controller(SimpleNamespace(type="linear", kl_coef=0.1))


def test_compute_rewards():
    # 2 - 0.1 * 0.5 and 0 - 0.1 * -1
    rewards = ca.compute_rewards(row(2, 0), LOGPROB, REFERENCE, 0.1)
    assert rewards[0].tolist() == pytest.approx([1.95, 0.1])


# ---- registries

REGISTER = {
    "advantage": (ca.register_adv_est, ca.get_adv_estimator_fn, "grpo"),
    "policy": (ca.register_policy_loss, ca.get_policy_loss_fn, "gspo"),
    "discriminator": (ca.register_discriminator_loss, ca.get_discriminator_loss_fn, "ranking"),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_registry(kind, registries):
    register, get, known = REGISTER[kind]

    def mine():
        """The first function."""

    def other():
        """Another one."""

    register("mine")(mine)
    assert register("mine")(mine) is mine, "the same function may be registered again"
    found = get("mine")
    assert (found.fn if kind == "discriminator" else found) is mine
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register("mine")(other)
    with pytest.raises(ValueError, match=rf"'nosuch'.*{known}.*mine|'nosuch'.*mine.*{known}"):
        get("nosuch")


def test_registered_names():
    assert ca.get_adv_estimator_fn("grpo") is ca.compute_grpo_outcome_advantage
    assert ca.get_adv_estimator_fn(ca.AdvantageEstimator.GRPO) is ca.compute_grpo_outcome_advantage
    assert ca.get_policy_loss_fn("vanilla") is ca.compute_policy_loss_vanilla
    assert ca.get_policy_loss_fn("gspo") is ca.compute_policy_loss_gspo


def test_all_names_exist():
    assert [name for name in ca.__all__ if not hasattr(ca, name)] == []
