"""The discriminator's pooling, masks and losses against numbers worked out by hand."""

import math

import pytest
import torch

from verl.trainer.ppo.discriminator_algos import (
    PairScores,
    adapted_temperature,
    bradley_terry_loss,
    closing_eos,
    compute_discriminator_loss,
    discriminator_metrics,
    ends_with_eos,
    get_discriminator_loss_fn,
    hinge_loss,
    pool_scores,
    ranking_loss,
    score_mask,
    score_regulariser,
    two_sided_hinge_loss,
    with_one_eos,
)

EOS = 2


def log1pexp(x):
    """-logsigmoid(-x)."""
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- pooling

VALUES = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 7.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
POOL_MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("last_token", [4, 3, 0]),
        ("mean", [7 / 3, 3, 0]),  # (1 + 2 + 4) / 3
        ("sum", [7, 3, 0]),
    ],
)
def test_pool_scores(pooling, expected):
    for mask in (POOL_MASK, POOL_MASK.bool(), POOL_MASK.float()):
        assert pool_scores(VALUES, mask, pooling).tolist() == pytest.approx(expected)
    # More axes in front change nothing.
    stacked = pool_scores(VALUES[None].expand(2, 3, 4), POOL_MASK[None].expand(2, 3, 4), pooling)
    assert stacked.shape == (2, 3)
    assert stacked[1].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["last_token", "mean", "sum"])
@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 3), (1, 1)])
def test_pool_scores_does_not_see_padding(pooling, left, right):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 3, generator=generator)
    plain = pool_scores(values, torch.ones(1, 3), pooling)
    padded = torch.cat([torch.full((1, left), 50.0), values, torch.full((1, right), -70.0)], -1)
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    assert pool_scores(padded, mask, pooling).item() == pytest.approx(plain.item())


def test_pool_scores_last_token_takes_a_negative_value():
    # The last value is the answer's score even where it is below everything that the mask zeroes.
    assert pool_scores(torch.tensor([[5.0, -3.0, 9.0]]), torch.tensor([[1, 1, 0]]), "last_token").item() == -3.0


def test_pool_scores_last_token_gradient_reaches_that_token_alone():
    values = torch.zeros(1, 4, requires_grad=True)
    pool_scores(values, torch.tensor([[1, 1, 1, 0]]), "last_token").sum().backward()
    assert values.grad.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 3000), (torch.bfloat16, 300), (torch.float16, 3000)])
def test_pool_scores_last_token_of_a_long_answer(dtype, length):
    # bf16 counts exactly up to 256 and fp16 up to 2048; positions must not be counted in the values' type.
    values = torch.zeros(1, 4000, dtype=dtype)
    values[0, length - 2], values[0, length - 1] = -1.0, 1.0
    mask = (torch.arange(4000) < length).long()[None]
    assert pool_scores(values, mask, "last_token").item() == 1.0


def test_pool_scores_unknown():
    with pytest.raises(ValueError, match=r"'max'.*last_token, mean, sum"):
        pool_scores(VALUES, POOL_MASK, "max")


# ---- the tokens a score is pooled over


@pytest.mark.parametrize(
    ("ids", "mask", "expected"),
    [
        ([5, 6, EOS, 0], [1, 1, 1, 0], [1, 1, 0, 0]),  # EOS last
        ([5, 6, 7, 0], [1, 1, 1, 0], [1, 1, 1, 0]),  # no EOS
        ([5, 6, 7, 8], [1, 1, 1, 1], [1, 1, 1, 1]),  # cut off at full width
        ([5, 6, 7, EOS], [1, 1, 1, 1], [1, 1, 1, 0]),  # EOS in the last column
        ([EOS, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]),  # nothing but EOS: it keeps its score
        ([5, EOS, EOS, EOS], [1, 1, 0, 0], [1, 0, 0, 0]),  # padded with EOS, ends with EOS
        ([5, 6, EOS, EOS], [1, 1, 0, 0], [1, 1, 0, 0]),  # padded with EOS, was cut off before one
        ([5, EOS, 6, EOS], [1, 1, 1, 1], [1, 1, 1, 0]),  # EOS inside the answer is kept
        ([5, EOS, 6, 0], [1, 1, 1, 0], [1, 1, 1, 0]),  # EOS inside only
        ([EOS, EOS, EOS, EOS], [0, 0, 0, 0], [0, 0, 0, 0]),  # no answer at all
    ],
)
def test_score_mask(ids, mask, expected):
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    assert score_mask(ids, mask, EOS, exclude_eos=True).long().tolist() == [expected]
    assert score_mask(ids, mask.bool(), EOS, exclude_eos=True).long().tolist() == [expected]
    assert score_mask(ids, mask, EOS, exclude_eos=False).tolist() == mask.tolist()


def test_score_mask_with_a_choice_for_each_answer():
    ids, mask = torch.tensor([[5, EOS, 0], [5, EOS, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    chosen = score_mask(ids, mask, EOS, torch.tensor([True, False]))
    assert chosen.long().tolist() == [[1, 0, 0], [1, 1, 0]]


def test_an_answer_that_was_cut_has_no_eos_at_its_end():
    # The end; the end after nothing; cut; EOS inside only; nothing; EOS where the padding begins.
    ids = torch.tensor([[5, EOS, EOS], [EOS, 0, 0], [5, 5, 5], [EOS, 5, 5], [EOS, EOS, EOS], [5, EOS, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert ends_with_eos(ids, mask, EOS).tolist() == [True, True, False, False, False, False]


def test_several_eos():
    """2 is the tokenizer's EOS, 7 the model's other. Ends with each; has each inside only; is each alone; was cut."""
    ids = torch.tensor([[5, 2, 0], [5, 7, 0], [7, 2, 5], [7, 0, 0], [2, 0, 0], [5, 5, 5], [5, 5, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    assert ends_with_eos(ids, mask, (2, 7)).tolist() == [True, True, False, True, True, False, False]
    assert closing_eos(ids, mask, [2, 7]).int().tolist() == [
        [0, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0],
    ]  # fmt: skip
    assert score_mask(ids, mask, (2, 7), exclude_eos=True).tolist() == [
        [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0],
    ]  # fmt: skip
    assert with_one_eos(ids, mask, (2, 7)).tolist() == [
        [5, 2, 0], [5, 2, 0], [7, 2, 5], [2, 0, 0], [2, 0, 0], [5, 5, 5], [5, 5, 7],
    ]  # fmt: skip
    assert with_one_eos(ids, mask, 2).equal(ids)


def test_score_mask_of_groups():
    ids = torch.tensor([[[5, EOS, 0], [5, 6, 7]], [[EOS, 0, 0], [5, 6, EOS]]])
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]])
    expected = [[[1, 0, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]]
    assert score_mask(ids, mask, EOS, exclude_eos=True).tolist() == expected


@pytest.mark.parametrize("pooling", ["last_token", "mean", "sum"])
@pytest.mark.parametrize("exclude_eos", [True, False])
def test_identical_text_gets_identical_scores(pooling, exclude_eos):
    # The same three tokens, padded to width 4 for the student and 6 for the teacher.
    values = torch.tensor([0.3, -0.7, 1.1])
    scores = []
    for width in (4, 6):
        ids = torch.tensor([[5, 6, EOS] + [EOS] * (width - 3)])
        mask = (torch.arange(width) < 3).long()[None]
        padded = torch.cat([values, torch.full((width - 3,), 99.0)])[None]
        scores.append(pool_scores(padded, score_mask(ids, mask, EOS, exclude_eos), pooling).item())
    assert scores[0] == scores[1]


# ---- losses


def pairs(d, teacher_raw=0.0, student_raw=0.0):
    """Scores of pairs with difference d, teacher at d and student at 0; leaves of a graph."""
    d = torch.tensor(d, dtype=torch.float64)
    raw = [torch.full_like(d, value).requires_grad_() for value in (student_raw, teacher_raw)]
    return PairScores(torch.zeros_like(d).requires_grad_(), d.requires_grad_(), *raw)


def slopes(loss, scores):
    """d loss / d teacher score; the student's must be its opposite."""
    teacher, student = torch.autograd.grad(loss, [scores.teacher, scores.student])
    torch.testing.assert_close(teacher, -student)
    return teacher.tolist()


def test_bradley_terry():
    # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4: log 2, log 4/3, log 4.
    scores = pairs([0.0, math.log(3), -math.log(3)])
    loss, metrics = bradley_terry_loss(scores)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)
    assert {name: value.item() for name, value in metrics.items()} == {"critic/ranking_loss": loss.item()}
    # d/dd of -logsigmoid(d) is sigmoid(d) - 1, and each of 3 pairs weighs 1/3.
    assert slopes(loss, scores) == pytest.approx([-0.5 / 3, -0.25 / 3, -0.75 / 3])


@pytest.mark.parametrize(
    ("d", "value", "slope"),
    [
        # -logsigmoid(x) with x = clamp(d / 2, -10, 10); the slope in d is (sigmoid(x) - 1) / 2 inside, 0 outside.
        (0.0, math.log(2), -0.25),
        (2 * math.log(3), math.log(4 / 3), -0.125),
        (-19.0, log1pexp(9.5), (sigmoid(-9.5) - 1) / 2),
        (-20.0, log1pexp(10), (sigmoid(-10) - 1) / 2),  # at the clamp the slope is still the inner one
        (-21.0, log1pexp(10), 0.0),
        (19.0, log1pexp(-9.5), (sigmoid(9.5) - 1) / 2),
        (20.0, log1pexp(-10), (sigmoid(10) - 1) / 2),
        (21.0, log1pexp(-10), 0.0),
    ],
)
def test_ranking_term_around_its_clamps(d, value, slope):
    scores = pairs([d])
    loss, metrics = ranking_loss(scores, ranking_coef=1.0, reg_coef=0.0, diff_coef=0.0)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert metrics["critic/ranking_loss"].item() == pytest.approx(value, rel=1e-9)
    assert slopes(loss, scores) == pytest.approx([slope], rel=1e-9)


@pytest.mark.parametrize(
    ("d", "value", "slope"),
    [
        # relu(d - 1.5)^2, slope 2 relu(d - 1.5)
        (-5.0, 0.0, 0.0),
        (1.0, 0.0, 0.0),
        (1.5, 0.0, 0.0),
        (2.0, 0.25, 1.0),
        (2.5, 1.0, 2.0),
    ],
)
def test_brake_around_its_limit(d, value, slope):
    scores = pairs([d])
    loss, metrics = ranking_loss(scores, ranking_coef=0.0, reg_coef=0.0, diff_coef=1.0)
    assert loss.item() == metrics["critic/diff_penalty"].item() == value
    assert slopes(loss, scores) == [slope]


def test_regulariser():
    # 3^2 + (-2)^2 = 13; slopes 2 * 3 and 2 * -2. The pooled scores are not touched by it.
    scores = pairs([0.0], teacher_raw=3.0, student_raw=-2.0)
    loss, metrics = ranking_loss(scores, ranking_coef=0.0, reg_coef=1.0, diff_coef=0.0)
    assert loss.item() == metrics["critic/score_reg"].item() == 13.0
    teacher, student = torch.autograd.grad(loss, [scores.teacher_raw, scores.student_raw])
    assert (teacher.item(), student.item()) == (6.0, -4.0)


@pytest.mark.parametrize(
    ("reg_on", "value", "slopes_of_teacher_student"),
    [
        # Pooled scores .5 and -1.5; sums over tokens 3 and -2.
        ("raw", 13.0, (0.0, 0.0)),
        ("pooled", 0.25 + 2.25, (1.0, -3.0)),
        ("centre", 1.0, (-2.0, -2.0)),  # (.5 - 1.5)^2, slope 2 * -1 for both
    ],
)
def test_what_the_regulariser_pulls_on(reg_on, value, slopes_of_teacher_student):
    teacher = torch.tensor([[0.5]], requires_grad=True)
    student = torch.tensor([[-1.5]], requires_grad=True)
    raw = torch.tensor([[3.0]], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True)
    scores = PairScores(student=student, teacher=teacher, student_raw=raw[1], teacher_raw=raw[0])
    loss, metrics = ranking_loss(scores, ranking_coef=0.0, reg_coef=1.0, diff_coef=0.0, reg_on=reg_on)
    assert loss.item() == metrics["critic/score_reg"].item() == value
    gradients = torch.autograd.grad(loss + 0 * (teacher + student).sum(), [teacher, student])
    assert tuple(gradient.item() for gradient in gradients) == slopes_of_teacher_student


def test_centring_is_a_mean_over_pairs():
    # One teacher, 1, and students 1 and -3: ((1 + 1)^2 + (1 - 3)^2) / 2.
    student, teacher = torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0]])
    assert score_regulariser(PairScores(student, teacher, student, teacher), "centre").item() == 4.0


def test_an_unknown_regulariser_is_refused():
    with pytest.raises(ValueError, match="unknown reg_on 'mean': use one of raw, pooled, centre"):
        ranking_loss(pairs([0.0]), reg_on="mean")


def test_ranking_with_its_own_constants():
    # d = 2.5: 1.5 * log(1 + e^-1.25) + 0.005 * 13 + 0.5 * (2.5 - 1.5)^2
    scores = pairs([2.5], teacher_raw=3.0, student_raw=-2.0)
    loss, metrics = ranking_loss(scores)
    assert loss.item() == pytest.approx(1.5 * log1pexp(-1.25) + 0.065 + 0.5)
    # The metrics are without their coefficients.
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"critic/ranking_loss": log1pexp(-1.25), "critic/score_reg": 13.0, "critic/diff_penalty": 1.0}
    )
    # 1.5 * (sigmoid(1.25) - 1) / 2 + 0.5 * 2 * 1
    assert slopes(loss, scores) == pytest.approx([0.75 * (sigmoid(1.25) - 1) + 1.0])


def test_ranking_every_constant_counts():
    scores = pairs([3.0], teacher_raw=1.0, student_raw=2.0)
    # 2 * -logsigmoid(min(3 / 0.5, 4)) + 0.1 * (1 + 4) + 3 * (3 - 1)^2
    loss, _ = ranking_loss(
        scores, ranking_coef=2.0, temperature=0.5, clamp=4.0, reg_coef=0.1, diff_limit=1.0, diff_coef=3.0
    )
    assert loss.item() == pytest.approx(2 * log1pexp(-4) + 0.5 + 12.0)


@pytest.mark.parametrize(
    ("d", "lower", "upper", "slope"),
    [
        # Soft term: 0.5 * -logsigmoid(d / 2), slope 0.25 * (sigmoid(d / 2) - 1), none beyond |d / 2| = 10.
        # Below the margin 1 the hinge adds slope -1, above the limit 5 the upper one adds +1.
        (-30.0, 31.0, 0.0, -1.0),  # d / 2 = -15 is clamped
        (0.0, 1.0, 0.0, -1.0 + 0.25 * (0.5 - 1)),
        (1.0, 0.0, 0.0, 0.25 * (sigmoid(0.5) - 1)),  # at the margin
        (3.0, 0.0, 0.0, 0.25 * (sigmoid(1.5) - 1)),
        (5.0, 0.0, 0.0, 0.25 * (sigmoid(2.5) - 1)),  # at the limit
        (6.0, 0.0, 1.0, 0.25 * (sigmoid(3.0) - 1) + 1.0),
        (30.0, 0.0, 25.0, 1.0),
    ],
)
def test_hinges_around_their_limits(d, lower, upper, slope):
    soft = log1pexp(-max(-10.0, min(10.0, d / 2)))
    scores = pairs([d])
    loss, metrics = hinge_loss(scores)
    assert loss.item() == pytest.approx(lower + 0.5 * soft, rel=1e-9)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"critic/hinge_loss_lower": lower, "critic/ranking_loss": soft}, rel=1e-9
    )
    assert slopes(loss, scores) == pytest.approx([slope - (1.0 if d > 5 else 0.0)], rel=1e-9, abs=1e-12)

    scores = pairs([d])
    loss, metrics = two_sided_hinge_loss(scores)
    assert loss.item() == pytest.approx(lower + 0.5 * soft + upper, rel=1e-9)
    assert metrics["critic/hinge_loss_upper"].item() == upper
    assert slopes(loss, scores) == pytest.approx([slope], rel=1e-9, abs=1e-12)


def test_every_constant_of_the_hinges_counts():
    scores = pairs([1.5])
    # relu(2 - 1.5) + 3 * -logsigmoid(min(1.5 / 0.1, 4)), and relu(1.5 - 1.2) on top
    loss, _ = hinge_loss(scores, margin=2.0, ranking_coef=3.0, temperature=0.1, clamp=4.0)
    assert loss.item() == pytest.approx(0.5 + 3 * log1pexp(-4))
    loss, _ = two_sided_hinge_loss(scores, margin=2.0, upper=1.2, ranking_coef=3.0, temperature=0.1, clamp=4.0)
    assert loss.item() == pytest.approx(0.5 + 3 * log1pexp(-4) + 0.3)


def test_discriminator_metrics():
    # Teacher .4 against .1, .3 and teacher .5 against .5, .9: d = .3, .1, 0, -.4; a tie is not a win.
    scores = PairScores(
        student=torch.tensor([[0.1, 0.3], [0.5, 0.9]]),
        teacher=torch.tensor([[0.4], [0.5]]),
        student_raw=torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
        teacher_raw=torch.tensor([[4.0], [5.0]]),
    )
    metrics = {name: value.item() for name, value in discriminator_metrics(scores).items()}
    assert metrics == pytest.approx(
        {
            "critic/d_acc": 0.5,
            "critic/score_diff": 0.0,
            "critic/raw_score_diff": 1.5,  # 3, 2, 2, -1
            "critic/student_score_mean": 0.45,
            "critic/teacher_score_mean": 0.45,
            "critic/student_score_std": math.sqrt(0.0875),  # .35^2 + .15^2 + .05^2 + .45^2 = .35, over 4
            "critic/teacher_score_std": 0.05,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("mean_difference", "temperature"),
    [(0.0, 0.5), (0.2, 0.6), (-0.2, 0.6), (1.0, 1.0), (5.0, 3.0), (5.1, 3.0), (-40.0, 3.0)],
)
def test_adapted_temperature(mean_difference, temperature):
    assert adapted_temperature(mean_difference) == pytest.approx(temperature)


def test_adapted_temperature_every_constant_counts():
    assert adapted_temperature(2.0, offset=1.0, slope=0.25, lowest=0.1, highest=9.0) == pytest.approx(1.5)
    assert adapted_temperature(0.0, offset=0.2, lowest=0.4) == pytest.approx(0.4)
    assert adapted_temperature(9.0, highest=2.0) == pytest.approx(2.0)


OWN_LOSS = """
import torch

def squared(scores, target=1.0):
    loss = (scores.difference - target).square().mean()
    return loss, {"critic/squared": loss}

from verl.trainer.ppo.core_algos import register_discriminator_loss

@register_discriminator_loss("%s", pooling="last_token")
def named(scores):
    return squared(scores)
"""


def test_a_loss_from_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOSS % tmp_path.name)
    own = get_discriminator_loss_fn(f"{file}:squared")
    assert own.pooling == "mean"
    loss, _ = own.fn(pairs([3.0]), target=2.0)
    assert loss.item() == 1.0
    # Registered in the file, it brings its pooling; the file runs once.
    assert get_discriminator_loss_fn(f"{file}:named").pooling == "last_token"
    assert get_discriminator_loss_fn(f"{file}:named").fn is get_discriminator_loss_fn(tmp_path.name).fn


BAD_LOSSES = """
def leaves(scores):
    import sys
    sys.exit(0)

def nothing(scores):
    pass

def wide(scores):
    return scores.difference.square(), {}

def detached(scores):
    return scores.difference.square().mean().detach(), {}

def plain_metric(scores):
    return scores.difference.mean(), {"critic/mine": 1.0}
"""


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("leaves", RuntimeError, r"own.py:leaves tried to end the process by SystemExit\(0\)"),
        ("nothing", TypeError, r"own.py:nothing: expected a tuple \(tensor, dict\), got NoneType"),
        ("wide", TypeError, r"own.py:wide: expected a 0-d tensor with a gradient, got shape \(1,\)"),
        ("detached", TypeError, r"own.py:detached: expected a 0-d tensor with a gradient, .*requires_grad=False"),
        ("plain_metric", TypeError, r"own.py:plain_metric: expected 0-d tensors as metrics; \['critic/mine'\] are not"),
    ],
)
def test_what_a_loss_from_a_file_may_not_do_in_the_middle_of_a_run(tmp_path, name, error, message):
    (tmp_path / "own.py").write_text(BAD_LOSSES)
    scores = pairs([3.0])
    scores.student.requires_grad_()
    with pytest.raises(error, match=message):
        get_discriminator_loss_fn(f"{tmp_path}/own.py:{name}")(scores)


@pytest.mark.parametrize(
    ("text", "message"), [("x = 1", "no function 'loss'"), ("1 / 0", "ZeroDivisionError"), (None, "no file")]
)
def test_a_loss_that_cannot_be_had(tmp_path, text, message):
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        get_discriminator_loss_fn(f"{tmp_path}/own.py:loss")


# ---- the flat form

# Means over the masks: student 1 and 2, teacher 2 and 6. Sums: student 2 and 2, teacher 4 and 12.
STUDENT = torch.tensor([[0.0, 2.0, 9.0], [2.0, 9.0, 9.0]])
STUDENT_MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
TEACHER = torch.tensor([[1.0, 3.0, 7.0, 7.0], [4.0, 8.0, 7.0, 7.0]])
TEACHER_MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
FLAT = (STUDENT, TEACHER, STUDENT_MASK, TEACHER_MASK)
SHARED = {
    "critic/d_loss",
    "critic/ranking_loss",
    "critic/d_acc",
    "critic/score_diff",
    "critic/raw_score_diff",
    "critic/student_score_mean",
    "critic/teacher_score_mean",
    "critic/student_score_std",
    "critic/teacher_score_std",
    "critic/student_value_mean",
    "critic/teacher_value_mean",
}


def test_flat_ranking_by_hand():
    # d = 1 and 4. ranking: (log(1 + e^-.5) + log(1 + e^-2)) / 2.
    # Regulariser: (16 + 144) / 2 + (4 + 4) / 2 = 84. Brake: (0 + 2.5^2) / 2 = 3.125.
    loss, metrics = compute_discriminator_loss(*FLAT)
    ranking = (log1pexp(-0.5) + log1pexp(-2.0)) / 2
    assert loss.item() == pytest.approx(1.5 * ranking + 0.005 * 84 + 0.5 * 3.125)
    assert metrics == pytest.approx(
        {
            "critic/d_loss": loss.item(),
            "critic/ranking_loss": ranking,
            "critic/score_reg": 84.0,
            "critic/diff_penalty": 3.125,
            "critic/d_acc": 1.0,
            "critic/score_diff": 2.5,
            "critic/raw_score_diff": 6.0,  # (4 - 2 + 12 - 2) / 2
            "critic/student_score_mean": 1.5,
            "critic/teacher_score_mean": 4.0,
            "critic/student_score_std": 0.5,
            "critic/teacher_score_std": 2.0,
            "critic/student_value_mean": 4 / 3,  # (0 + 2 + 2) / 3 tokens
            "critic/teacher_value_mean": 4.0,  # (1 + 3 + 4 + 8) / 4 tokens
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_flat_bradley_terry_sums_by_default():
    # Sums: d = 2 and 10.
    loss, metrics = compute_discriminator_loss(*FLAT, loss="bradley_terry")
    assert loss.item() == pytest.approx((log1pexp(-2.0) + log1pexp(-10.0)) / 2)
    assert set(metrics) == SHARED
    assert metrics["critic/score_diff"] == pytest.approx(6.0)


def test_flat_adaptive_temperature():
    # Means: d = 1 and 4, mean 2.5: T = 0.5 + 1.25. The brake and the regulariser are as with a constant temperature.
    loss, metrics = compute_discriminator_loss(*FLAT, adaptive_temperature=True)
    ranking = (log1pexp(-1 / 1.75) + log1pexp(-4 / 1.75)) / 2
    assert metrics["critic/ranking_loss"] == pytest.approx(ranking)
    assert loss.item() == pytest.approx(1.5 * ranking + 0.005 * 84 + 0.5 * 3.125)


def test_flat_pooling_can_be_chosen():
    # Last tokens: teacher 3 and 8, student 2 and 2: d = 1 and 6. Means: d = 1 and 4.
    last, _ = compute_discriminator_loss(*FLAT, loss="bradley_terry", pooling="last_token")
    assert last.item() == pytest.approx((log1pexp(-1.0) + log1pexp(-6.0)) / 2)
    mean, _ = compute_discriminator_loss(*FLAT, loss="bradley_terry", pooling="mean")
    assert mean.item() == pytest.approx((log1pexp(-1.0) + log1pexp(-4.0)) / 2)


def test_poolings_the_losses_were_made_for():
    assert get_discriminator_loss_fn("bradley_terry").pooling == "last_token"
    assert get_discriminator_loss_fn("ranking").pooling == "mean"


def test_flat_constants_are_keywords():
    # Temperature 1 and no other term: (log(1 + e^-1) + log(1 + e^-4)) / 2
    loss, _ = compute_discriminator_loss(*FLAT, ranking_coef=1.0, temperature=1.0, reg_coef=0.0, diff_coef=0.0)
    assert loss.item() == pytest.approx((log1pexp(-1.0) + log1pexp(-4.0)) / 2)
    with pytest.raises(TypeError, match="margins"):
        compute_discriminator_loss(*FLAT, margins=1.0)
    with pytest.raises(ValueError, match=r"'wasserstein'.*bradley_terry.*ranking"):
        compute_discriminator_loss(*FLAT, loss="wasserstein")


@pytest.mark.parametrize("loss", ["bradley_terry", "hinge", "two_sided_hinge", "ranking"])
def test_identical_answers_cannot_be_told_apart(loss):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    _, metrics = compute_discriminator_loss(values, values.clone(), mask, mask, loss=loss)
    assert metrics["critic/score_diff"] == 0.0
    assert metrics["critic/d_acc"] == 0.0
    assert metrics["critic/ranking_loss"] == pytest.approx(math.log(2))
    if loss == "ranking":
        assert metrics["critic/diff_penalty"] == 0.0


@pytest.mark.parametrize("loss", ["bradley_terry", "hinge", "two_sided_hinge", "ranking"])
@pytest.mark.parametrize("pooling", ["last_token", "mean", "sum"])
def test_grouped_equals_flat(loss, pooling):
    B, N, T = 3, 4, 5
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(B, N, T, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, 1, T, generator=generator, dtype=torch.float64, requires_grad=True)
    student_mask = torch.arange(T) < torch.randint(1, T + 1, (B, N, 1), generator=generator)
    teacher_mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1, 1), generator=generator)

    scores = PairScores.pool(student, teacher, student_mask, teacher_mask, pooling)
    assert scores.student.shape == (B, N)
    assert scores.teacher.shape == (B, 1)
    grouped, parts = get_discriminator_loss_fn(loss).fn(scores)
    flat, metrics = compute_discriminator_loss(
        student.flatten(0, 1),
        teacher.squeeze(1).repeat_interleave(N, 0),
        student_mask.flatten(0, 1),
        teacher_mask.squeeze(1).repeat_interleave(N, 0),
        loss=loss,
        pooling=pooling,
    )
    assert grouped.item() == pytest.approx(flat.item())
    for name, value in {**parts, **discriminator_metrics(scores)}.items():
        assert metrics[name] == pytest.approx(value.item()), name
    for one, other in zip(
        torch.autograd.grad(grouped, [student, teacher]), torch.autograd.grad(flat, [student, teacher]), strict=True
    ):
        torch.testing.assert_close(one, other)
