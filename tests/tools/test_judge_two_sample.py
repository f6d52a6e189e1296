"""The two-sample test: folds, pairs and one discriminator, on a tiny model."""

import dataclasses

import numpy as np
import pytest

from tests.tiny import write_model
from verl.models.layers import compile_layers, decoder_layers
from verl.tools.judge.kept import Kept
from verl.tools.judge.numbers import Numbers
from verl.tools.judge.report import Verdict, changes, render
from verl.tools.judge.trials import Trial, trials_of, two_sample
from verl.tools.judge.two_sample import (
    Judge,
    JudgeSettings,
    Pair,
    TwoSample,
    fold_of_prompts,
    make_pairs,
    split_pairs,
)
from verl.tools.prompts import PromptAndAnswer
from verl.utils.progress import Progress

EOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


class Recorder:
    """Learns nothing, and knows what it was asked: the teacher is above a short answer and ties with a long one, but
    loses to prompt 0's."""

    def __init__(self, fails_after: int = 1000):
        self.seen, self.fails_after = [], fails_after

    def train(self, pairs, seed, progress):
        self.fails_after -= 1
        if self.fails_after < 0:
            raise RuntimeError("killed")
        self.learned = {pair.prompt for pair in pairs}
        return seed / 100

    def differences(self, pairs, eos):
        tested = {pair.prompt for pair in pairs}
        assert not tested & self.learned and tested | self.learned == set(range(11))
        self.seen += [pair.prompt for pair in pairs]
        return np.array([-1.0 if p.prompt == 0 else float(len(p.candidate[1]) == 2) for p in pairs])


SETTINGS = JudgeSettings(seeds=3, folds=4)


def of_eleven(recorder, path, settings=SETTINGS, known_by="base", first=(6, EOS)):
    """Of eleven prompts with two answers each; `first` is the first prompt's first one."""
    answers = [[first, (7, 8, EOS)], *[[(6, EOS), (7, 8, EOS)]] * 10]
    pairs = make_pairs([(9, n) for n in range(11)], [[(5, EOS)]] * 11, answers)
    return two_sample("s", pairs, lambda: recorder, settings, known_by=known_by, eos_token_id=EOS, kept=Kept(path))


def test_every_prompt_is_tested_once_and_never_trained_on(tmp_path):
    recorder = Recorder()
    result = of_eleven(recorder, tmp_path / "kept.jsonl")
    assert sorted(recorder.seen) == sorted([*range(11)] * 2 * 3)
    assert result.by_seed == pytest.approx([(10 * 1 + 10 * 0.5) / 22] * 3)
    assert result.accuracy.clusters == 11 and result.accuracy.count == 22
    assert result.fitted == pytest.approx(0.055)  # the mean of 0 to 11 hundredths
    # Only the short answers have the teacher's length.
    assert (result.matched(0.2).value, result.matched(0.2).count) == (pytest.approx(10 / 11), 11)


def test_what_was_tried_is_kept(tmp_path, capsys):
    """A run that was killed in its eighth trial goes on there; nobody is asked for once all is known."""
    path = tmp_path / "kept.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        of_eleven(Recorder(fails_after=7), path)
    second = Recorder()
    result = of_eleven(second, path)
    assert "discriminators of s: 7 of 12 are taken from" in capsys.readouterr().err
    whole = of_eleven(Recorder(), tmp_path / "another.jsonl")
    np.testing.assert_array_equal(result.outcomes, whole.outcomes)
    # The last of the second repetition's four folds was missing, that of 2 or 3 prompts, and all of the third's.
    assert result.fitted == whole.fitted and len(second.seen) in (2 * (2 + 11), 2 * (3 + 11))
    assert of_eleven(None, path).fitted == whole.fitted
    # Fewer seeds are among them; another base, other folds or another answer are not.
    assert of_eleven(None, path, JudgeSettings(seeds=1, folds=4)).fitted == pytest.approx(0.015)
    others = {"known_by": "another base"}, {"settings": JudgeSettings(seeds=3, folds=3)}, {"first": (8, EOS)}
    for changed in others:
        with pytest.raises(RuntimeError, match="killed"):
            of_eleven(Recorder(fails_after=0), path, **changed)


def test_an_outcome_is_of_its_seed():
    """The same pairs to train on and to test, by chance: with another seed it is another discriminator."""
    first, second, third = (
        Trial(repetition, 0, seed, np.array([1, 0, 0])) for repetition, seed in ((0, 0), (7, 0), (0, 1))
    )
    assert first.request("abc", "base") == second.request("abc", "base") != third.request("abc", "base")


def test_all_that_shapes_a_discriminator_is_said(monkeypatch):
    said = JudgeSettings().shaping()
    free = [JudgeSettings(seeds=9), JudgeSettings(folds=9), JudgeSettings(max_tokens=9)]
    shaping = [JudgeSettings(epochs=9), JudgeSettings(batch_size=9), JudgeSettings(lr=9)]
    assert all(settings.shaping() == said for settings in free) and all(s.shaping() != said for s in shaping)
    monkeypatch.setattr("verl.tools.judge.two_sample.MADE_BY", 0)
    assert JudgeSettings().shaping() != said


def test_folds_are_even_and_drawn():
    folds = [fold_of_prompts(23, 5, seed) for seed in range(2)]
    assert sorted(np.bincount(folds[0])) == [4, 4, 5, 5, 5]
    assert (folds[0] != folds[1]).any()
    # 23 prompts in folds of 4 and 5 leave 18 and 19 to train on: 5 updates of 4 pairs at most, thrice.
    pairs = [Pair(n, PromptAndAnswer((2,), (3,)), PromptAndAnswer((2,), (4,))) for n in range(23)]
    settings = JudgeSettings(seeds=2, folds=5, epochs=3, batch_size=4)
    assert [trial.updates(settings) for trial in trials_of(pairs, settings)] == [3 * 5] * 2 * 5


def test_lengths_are_compared_with_the_longer_one():
    pair = Pair(0, PromptAndAnswer((2,), (3,) * 9), PromptAndAnswer((2,), (3,) * 10))
    assert pair.length_gap == pytest.approx(0.1) and pair.tokens == 21
    test = TwoSample(np.ones((1, 1)), np.zeros(1), np.array([pair.length_gap]), 1.0)
    assert test.matched(0.1).count == 1


def test_splitting_a_batch():
    pairs = [Pair(n, PromptAndAnswer((2,), (3,)), PromptAndAnswer((2,), (4,) * n)) for n in (1, 2, 9, 1)]
    assert [[p.prompt for p in part] for part in split_pairs(pairs, 9)] == [[1, 2], [9], [1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_forgets_the_last_student(model, dtype):
    pairs = make_pairs([(9, n) for n in range(4, 20)], [[(5, 6, EOS)]] * 16, [[(7, 8, 9, EOS)]] * 16)
    judge = Judge(model, JudgeSettings(lr=3e-3, batch_size=8, max_tokens=30), "cpu", dtype)
    first = judge.train(pairs, 0, Progress(0, "discriminators", "update"))
    d = judge.differences(pairs, EOS)
    assert (d > 0).all()
    mirrored = [dataclasses.replace(p, reference=p.candidate, candidate=p.reference) for p in pairs]
    judge.train(mirrored, 1, Progress(0, "discriminators", "update"))
    assert (judge.differences(pairs, EOS) < 0).all()
    assert judge.train(pairs, 0, Progress(0, "discriminators", "update")) == first
    np.testing.assert_array_equal(judge.differences(pairs, EOS), d)


def test_one_whose_layers_are_compiled_is_the_same_judge(model):
    pairs = make_pairs([(9, n) for n in range(4, 20)], [[(5, 6, EOS)]] * 16, [[(5, 8, EOS)]] * 16)
    scores = []
    for compiled in (False, True):
        judge = Judge(model, JudgeSettings(lr=1e-3, batch_size=8), "cpu", "float32")
        if compiled:
            compile_layers(judge.model.hf)
            assert len(decoder_layers(judge.model.hf)) == 2
        judge.train(pairs, 0, Progress(0, "discriminators", "update"))
        scores.append(judge.differences(pairs, EOS))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_splits_of_a_batch_give_the_same_judge(model):
    pairs = make_pairs([(9, n) for n in range(4, 20)], [[(5, 6, EOS)]] * 16, [[(5, 8, EOS)]] * 16)
    scores = []
    for max_tokens in (1, 25, 4096):
        judge = Judge(model, JudgeSettings(lr=1e-3, batch_size=8, max_tokens=max_tokens), "cpu", "float32")
        judge.train(pairs, 0, Progress(0, "discriminators", "update"))
        scores.append(judge.differences(pairs, EOS))
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-3)
    np.testing.assert_allclose(scores[1], scores[2], atol=1e-3)


def test_an_accuracy_near_a_half_is_warned_of_where_training_pairs_were_told_badly():
    def test_of(right, fitted):
        return TwoSample(np.array([[1.0] * right + [0.0] * (40 - right)]), np.arange(40), np.zeros(40), fitted)

    told = {"a": test_of(21, 0.69), "b": test_of(21, 0.71), "c": test_of(39, 0.69)}
    none = Numbers(*[0.0] * len(dataclasses.fields(Numbers)[:-1]), (0.0,) * 4)
    text = render({name: Verdict(none, test) for name, test in told.items()}, none, "teacher", "better")
    (warning,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert "in less than 0.7 of them: a (0.690). " in warning and "--judge_lr or --judge_epochs" in warning


def test_changes_are_paired_by_prompt():
    def test_of(values):
        return TwoSample(np.array([values]), np.arange(len(values)), np.zeros(len(values)), 1.0)

    far, near = [1.0] * 12, [1.0, 0.0] * 6
    says = changes({"base": test_of(far), "seqkd": test_of(near), "again": test_of(near)}, "teacher")
    assert says[0].startswith("seqkd is closer to teacher than base (accuracy -0.500 [")
    assert says[1].startswith("again or seqkd: too close to call (accuracy +0.000")
