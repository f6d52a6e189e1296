"""The toy of two modes: its distributions against numbers worked out by hand, and reduced runs against the theory.

Maximum likelihood of an exponential family matches the sample's moments; GAD leaves the valley for one mode where that
is downhill, and stays spread where it is not.
"""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm

from examples.toy_modes import (
    EXPERIMENTS,
    NARROW,
    UNEVEN,
    Mixture,
    Student,
    Toy,
    draw,
    gaussian_log_probs,
    measure,
    mixture_probs,
    moments,
    run,
    sample,
    table,
    train_gad,
    train_seqkd,
)

REDUCED = replace(Toy(), steps=500)
TINY = replace(Toy(), steps=8, critic_warmup=2, exact_steps=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers_of(teacher: Mixture) -> torch.Tensor:
    return sample(mixture_probs(teacher, 10), REDUCED.teacher_answers, torch.Generator().manual_seed(0))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# ---- distributions


def test_gaussian_by_hand():
    # mean 1, std 1, classes 0..2: exp(-1/2), 1, exp(-1/2)
    probs = gaussian_log_probs(torch.tensor(1.0), torch.tensor(0.0), 3).exp()
    assert probs.sum().item() == pytest.approx(1)
    assert probs.tolist() == pytest.approx([0.274069, 0.451863, 0.274069], abs=1e-6)
    # std 2: one class further costs 1 / (2 * 4), two cost 4 / (2 * 4)
    log_probs = gaussian_log_probs(torch.tensor(0.0), torch.tensor(math.log(2.0)), 3)
    assert (log_probs - log_probs[0]).tolist() == pytest.approx([0, -0.125, -0.5])


def test_gaussian_agrees_with_scipy():
    density = norm.pdf(range(10), loc=3.7, scale=1.9)
    probs = gaussian_log_probs(torch.tensor(3.7), torch.tensor(math.log(1.9)), 10).exp()
    assert probs.tolist() == pytest.approx(list(density / density.sum()), abs=1e-6)


def test_mixture_by_hand():
    # Two Gaussians so narrow that each is one class; the weights are heights, and need not sum to one.
    spikes = Mixture("spikes", (3.0, 1.0), (0.0, 2.0), (0.1, 0.1), ((0,), (2,)), (1,))
    assert mixture_probs(spikes, 3).tolist() == pytest.approx([0.75, 0, 0.25])
    # Heights 2 and 1, means 0 and 1, stds 1 and 0.5: 2 + exp(-2), 2 exp(-1/2) + 1, before normalising.
    mass = [2 + math.exp(-2), 2 * math.exp(-0.5) + 1]
    hand = Mixture("hand", (2.0, 1.0), (0.0, 1.0), (1.0, 0.5), ((0,), (1,)), ())
    assert mixture_probs(hand, 2).tolist() == pytest.approx([m / sum(mass) for m in mass])


@pytest.mark.parametrize("teacher", [UNEVEN, NARROW], ids=lambda teacher: teacher.name)
def test_teachers(teacher):
    probs = mixture_probs(teacher, 10)
    assert probs.sum().item() == pytest.approx(1)
    # scipy's density has the factor 1 / std that the teacher's formula leaves out
    parts = zip(teacher.weights, teacher.means, teacher.stds, strict=True)
    mass = sum(w * s * norm.pdf(range(10), loc=m, scale=s) for w, m, s in parts)
    assert probs.tolist() == pytest.approx(list(mass / mass.sum()), abs=1e-6)
    named = [k for classes in (*teacher.modes, teacher.valley) for k in classes]
    assert len(named) == len(set(named))
    assert probs[list(teacher.valley)].max() < 0.01 < min(probs[round(mean)] for mean in teacher.means)


def test_moments_by_hand():
    mean, std = moments(torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]))
    assert mean.tolist() == pytest.approx([1.5, 1.0])
    assert std.tolist() == pytest.approx([math.sqrt(0.25 * 2.25 + 0.75 * 0.25), 0.0])


def test_a_row_of_the_table_by_hand():
    # A student on class 0 of two equally likely ones: KL(S||T) = log 2. It gives class 1 a log-prob of
    # -1 / (2 * 0.2^2) = -12.5, so KL(T||S) = 12.5 / 2 - log 2. The last quarter of the trace jumps from class 0 to 1.
    spikes = Mixture("spikes", (1.0, 1.0), (0.0, 1.0), (0.2, 0.2), ((0,), (1,)), ())
    student = Student(replace(Toy(), classes=2, start_mean=0.0, start_std=0.2))
    student.trace = [(9.0, 0.0)] * 4 + [(0.0, -5.0), (1.0, -5.0)] * 2
    row = measure("m", 0, student, spikes).row
    expected = [1, 0, 0, math.log(2), 6.25 - math.log(2), 0, 0, math.sqrt(0.5)]
    assert row == pytest.approx(expected, abs=0.005)


# ---- training


@pytest.fixture(scope="module")
def seqkd():
    answers = answers_of(UNEVEN)
    return answers, measure("SeqKD", 0, train_seqkd(REDUCED, answers, generator()), UNEVEN)


def test_maximum_likelihood_matches_the_moments_of_the_sample(seqkd):
    answers, result = seqkd
    mean, std = moments(result.probs)
    assert mean.item() == pytest.approx(answers.double().mean().item(), abs=0.15)
    assert std.item() == pytest.approx(answers.double().std().item(), abs=0.15)


@pytest.mark.parametrize("loss", EXPERIMENTS[0][1])
def test_gad_settles_on_one_mode_and_leaves_the_valley(seqkd, loss):
    gad = measure(loss, 0, train_gad(REDUCED, seqkd[0], generator(), loss), UNEVEN).row
    heavy, light, valley, reverse_kl, forward_kl, *_ = seqkd[1].row
    assert heavy < 0.75 and light > 0.1
    assert gad[0] > 0.93 and gad[1] < 0.02
    assert valley > 0.1 > 0.05 > gad[2]
    assert gad[3] < 0.6 * reverse_kl and gad[4] > 2 * forward_kl


def test_gad_stays_spread_where_a_mode_is_not_downhill():
    # The heavy mode alone (0.6 of the teacher) would be at log(1 / 0.6) = 0.51 nats.
    student = train_gad(REDUCED, answers_of(NARROW), generator(), "bradley_terry")
    heavy, light, valley, reverse_kl, *_ = measure("GAD", 0, student, NARROW).row
    assert heavy < 0.5 and light > 0.15 and valley > 0.15 and reverse_kl > 1.4


def test_the_student_is_frozen_during_the_warmup():
    warmup_only = train_gad(replace(Toy(), steps=0, critic_warmup=20), answers_of(UNEVEN), generator(), "ranking")
    assert (warmup_only.mean.item(), warmup_only.trace) == (4.5, [])
    assert len(train_gad(TINY, answers_of(UNEVEN), generator(), "ranking").trace) == TINY.steps


# ---- report


def test_table_and_figure(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="the figure needs matplotlib")
    tables = [(teacher, run(TINY, teacher, losses, seeds=2)) for teacher, losses in EXPERIMENTS]
    lines = table(*tables[0]).splitlines()
    # the teacher, a heading, 2 seeds of 5 methods, 2 references, 5 means
    assert len(lines) == 2 + 10 + 2 + 5
    assert lines[1].split()[:5] == ["mode", "3", "mode", "8", "valley"]
    assert lines[2].startswith("SeqKD                seed 0")
    draw(tables, TINY.classes, tmp_path / "new" / "toy.png")
    assert image.imread(tmp_path / "new" / "toy.png").shape[1] == 1200
