"""Answers written a step ahead, by played workers: which weights write what, what a checkpoint has of it, and when the
engine is given weights. Weights are a number, which each update raises by one, and every token written is that number.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from itertools import islice

import numpy as np
import pytest
import torch

from tests.workers.updates_setup import PROMPTS, batch
from verl.batch import PROMPT_KEYS, TEACHER_KEYS, Prompts, table
from verl.protocol import DataProto
from verl.trainer.config import compose_config
from verl.trainer.ppo.engine import OwnEngine
from verl.trainer.ppo.one_step_off import COMPARED_TOKENS, OneStepOff
from verl.trainer.ppo.student import Student

N, T = 2, 3
STEPS = 4
GAP = "training/rollout_probs_diff_mean"


class Later:
    """What an engine's call returns; `get` is when it is over."""

    def __init__(self, end):
        self.get = end


class Workers:
    """Those that train; `line` has the weights that they have sent, in order."""

    def __init__(self, weights=0):
        self.weights, self.line = weights, []

    def update_actor(self, rows):
        self.weights += 1
        return [{}]

    def send_weights(self):
        self.line.append(self.weights)

    def compute_log_prob(self, rows):
        values = torch.full((len(rows), N, T), -0.1 * self.weights)
        return DataProto.from_dict({"old_log_probs": values, "entropys": torch.ones_like(values)})


class Engines:
    """Of one rank; `calls` has what they wrote: by which weights, to how many prompts, with which seed and limit."""

    world_size = 1

    def __init__(self, workers):
        self.workers, self.weights, self.calls = workers, None, []

    def receive_weights(self):
        def end():
            self.weights = self.workers.line[-1]

        return Later(end)

    def generate_sequences(self, rows):
        asked = rows.meta_info
        self.calls.append((self.weights, len(rows), asked["seed"], asked.get("longest")))
        made = torch.full((len(rows), N, T), self.weights)
        reported = (torch.arange(len(rows)) < asked["report_log_probs"]).long()
        columns = {
            "responses": made,
            "response_mask": torch.ones_like(made),
            "rollout_log_probs": -0.1 * made * reported[:, None, None],
            "rollout_log_probs_mask": reported,
        }
        return Later(lambda: DataProto.from_dict(columns))


class Run:
    """A student, engines of its own, and batches of prompts by the numbers of their rows."""

    def __init__(self, *overrides, weights=0):
        settings = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
        settings += [f"data.train_batch_size={PROMPTS}", "trainer.device=cpu", f"data.max_response_length={T}"]
        settings += [f"actor_rollout_ref.rollout.n={N}", "actor_rollout_ref.rollout.sync_check_prompts=1"]
        settings += ["trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1", "data.seed=40"]
        config = compose_config([*settings, *overrides])
        self.workers = Workers(weights)
        self.engines = Engines(self.workers)
        engine = OwnEngine(self.workers, self.engines)
        self.student = Student(config, self.workers, None, (1,), engine)
        weighs = config.algorithm.rollout_is is not None
        self.generation = OneStepOff(self.student, engine, config.actor_rollout_ref.rollout, weighs)
        self.timed = []

    def batches(self, first=0):
        data = batch()
        for number in range(first, STEPS):
            index = np.arange(number * PROMPTS, (number + 1) * PROMPTS)
            tensors = {key: data.batch[key] for key in PROMPT_KEYS + TEACHER_KEYS}
            yield Prompts(**tensors, index=index, teacher_text=np.full(PROMPTS, ""))

    @contextmanager
    def _timed(self, name):
        self.timed.append(name)
        yield

    def steps(self, first=0, updates=True):
        """Of each step the number that its answers are made of, and what it logs."""
        with closing(self.generation.through(self.batches(first), first)) as batches:
            for step, prompts in enumerate(batches, first):
                answers, metrics = self.generation.answers(prompts, step, self._timed)
                metrics |= self.generation.check_sync(prompts, answers, None, step)
                if updates:
                    self.student.imitate(prompts)
                assert answers.responses.unique().numel() == 1
                yield int(answers.responses[0, 0, 0]), metrics


def test_a_step_trains_on_what_the_weights_of_one_update_before_have_written():
    run = Run()
    made = list(run.steps())
    assert [by for by, _ in made] == [0, 0, 1, 2]
    assert [metrics["training/rollout_staleness"] for _, metrics in made] == [0, 1, 1, 1]
    assert run.workers.line == [0, 1, 2], "the last step, which writes nothing, pushes nothing"
    # Before the loop the first batch; then a comparison and the next batch, with the seed of the step it is for.
    written = [(0, PROMPTS, 40, None)]
    for step in (1, 2, 3):
        written += [(step - 1, 1, 40 + step, COMPARED_TOKENS), (step - 1, PROMPTS, 40 + step, None)]
    assert run.engines.calls == written
    assert run.timed == ["gen_wait", "push_weights"] * 3 + ["gen_wait"]


def test_frozen_weights_are_pushed_once_and_nothing_is_stale():
    run = Run()
    made = list(run.steps(updates=False))
    assert [(by, metrics["training/rollout_staleness"]) for by, metrics in made] == [(0, 0)] * STEPS
    assert run.workers.line == [0]


def test_the_weights_of_now_are_compared_and_not_those_that_wrote_the_answers():
    gaps = [metrics.get(GAP) for _, metrics in Run().steps()]
    assert gaps == [pytest.approx(0, abs=1e-6)] * 3 + [None]
    assert all("actor/entropy" not in metrics for _, metrics in Run().steps()), "that of a few answers' beginnings"
    unasked = Run("actor_rollout_ref.rollout.sync_check_prompts=0").steps()
    assert [metrics.get(GAP) for _, metrics in unasked] == [None] * STEPS


def test_a_push_that_does_not_arrive_is_seen(caplog):
    run = Run("actor_rollout_ref.rollout.sync_check_tolerance=0.05")
    run.workers.send_weights = lambda: run.workers.line.append(0)
    gaps = [metrics.get(GAP) for _, metrics in run.steps()]
    # Probabilities of exp(0) by the engine; by the trainer exp(0), exp(-0.1), exp(-0.2).
    assert gaps[:3] == pytest.approx([0, 1 - 0.904837, 1 - 0.818731], abs=1e-5)
    warned = [message.partition(":")[0] for message in caplog.messages if "token probabilities differ" in message]
    assert warned == ["step 1", "step 2"]


def test_what_is_asked_of_the_engine_in_between_is_written_by_the_weights_of_now():
    """A validation between two steps; what was begun before it stays what it is, and the push is not made twice."""
    run = Run()
    steps = run.steps()
    assert [by for by, _ in islice(steps, 2)] == [0, 0]
    sampling = run.generation.config.val_kwargs
    answers = run.student.sample(table(next(run.batches())), sampling, seed=0)
    assert answers.responses.unique().tolist() == [2]
    assert [by for by, _ in steps] == [1, 2]
    assert run.workers.line == [0, 1, 2]


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_a_checkpoint_has_the_answers_to_the_next_batch(tmp_path, saved_after):
    whole = list(Run("algorithm.rollout_is=token").steps())
    saved, file = Run("algorithm.rollout_is=token"), tmp_path / "ahead.safetensors"
    steps = saved.steps()
    before = list(islice(steps, saved_after))
    saved.generation.save(file)
    assert len(before) + len(list(steps)) == STEPS, "a run that saves goes on as it would"

    again = Run("algorithm.rollout_is=token", weights=saved_after)
    again.generation.load(file)
    again.student.weights_changed()  # as by the checkpoint that was loaded
    assert before + list(again.steps(saved_after)) == whole
    after = again.engines.calls
    assert after == saved.engines.calls[len(saved.engines.calls) - len(after) :]


def test_after_the_last_step_there_is_nothing_to_save(tmp_path):
    run, file = Run(), tmp_path / "ahead.safetensors"
    list(run.steps())
    run.generation.save(file)
    assert not file.exists()
    run.generation.load(file)
    by, metrics = next(run.steps())
    assert (by, metrics["training/rollout_staleness"]) == (STEPS, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": ["actor_rollout_ref.rollout.n=3"]},
        {"overrides": ["algorithm.rollout_is=token"]},
        {"first": 3},
    ],
    ids=["another number of answers", "log-probs that were not reported", "another batch"],
)
def test_answers_that_are_not_this_runs_are_written_anew(tmp_path, caplog, change):
    saved, file = Run(), tmp_path / "ahead.safetensors"
    steps = saved.steps()
    list(islice(steps, 2))
    saved.generation.save(file)
    again = Run(*change.get("overrides", ()), weights=2)
    again.generation.load(file)
    again.student.weights_changed()
    by, metrics = next(again.steps(change.get("first", 2)))
    assert (by, metrics["training/rollout_staleness"]) == (2, 0)
    assert "are written anew, by the weights at hand" in caplog.text
