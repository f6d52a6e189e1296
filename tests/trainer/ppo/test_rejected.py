"""Which answers a batch gets, when they are drawn, and that they survive a restart; the workers are played."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.batch import Answers, PairLogProbs, Prompts
from verl.protocol import DataProto
from verl.trainer.ppo.rejected import RejectedAnswers, equal_pairs

ROWS, WIDTH = 5, 4


class Data(torch.utils.data.Dataset):
    """Five rows, numbered 10, 12, ... in the file; the teacher's answer to row i is two tokens."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return row


def collate(rows):
    teacher = torch.zeros(len(rows), WIDTH, dtype=torch.long)
    teacher[:, :2] = 7
    return {
        "input_ids": torch.tensor(rows).unsqueeze(-1),
        "attention_mask": torch.ones(len(rows), 1, dtype=torch.long),
        "teacher_response": teacher,
        "teacher_attention_mask": torch.cat([torch.ones(len(rows), 1, dtype=torch.long), (teacher > 0).long()], -1),
        "index": np.array([10 + 2 * row for row in rows], dtype=object),
        "teacher_text": np.array(["77"] * len(rows), dtype=object),
    }


class FakeStudent:
    """A student that answers prompt r with r % 4 + 1 tokens that name its prompt and the steps it has learned."""

    def __init__(self, resample="once", max_num_seqs=2, drops_weights=False):
        rollout = SimpleNamespace(
            max_num_seqs=max_num_seqs, drops_weights=drops_weights, sync_check_prompts=0, seed=3,
            response_length=WIDTH, sampling=None,
        )  # fmt: skip
        self.config = SimpleNamespace(
            soda=SimpleNamespace(resample=resample),
            data=SimpleNamespace(max_response_length=WIDTH, dataloader_num_workers=0),
            trainer=SimpleNamespace(ranks=1),
            actor_rollout_ref=SimpleNamespace(rollout=rollout),
        )
        self.steps = self.samples_seen = 0
        self.calls: list[tuple[int, int]] = []

    def sample(self, prompts, sampling, seed, report):
        self.calls.append((seed, len(prompts)))
        rows = prompts.batch["input_ids"][:, 0]
        mask = (torch.arange(WIDTH) < (rows % 4 + 1).unsqueeze(-1)).long()
        tokens = (100 * (self.steps + 1) + rows.unsqueeze(-1)) * mask
        return Answers(responses=tokens.unsqueeze(1), response_mask=mask.unsqueeze(1))

    def check_sync(self, prompts, answers, log_probs, step):
        return {}

    def pair_reference_log_probs(self, prompts, answers):
        rows = prompts.input_ids[:, 0].float()
        return PairLogProbs(chosen_ref_log_prob=-rows, rejected_ref_log_prob=-10 * rows)


def rejected_of(student, seed=1000):
    return RejectedAnswers(student.config, student, Data(), collate, seed)


def prompts_of(rows, **changes):
    return Prompts.of(DataProto.from_single_dict(collate(rows) | changes))


def step(student, rejected, rows):
    """One training step on the given rows: the steps that their answers' weights had made."""
    answers, reference, _ = rejected.of(prompts_of(rows), student.samples_seen, student.steps)
    tensors = answers.tensors() | reference.tensors()
    lengths = [row % 4 + 1 for row in rows]
    assert tensors["response_mask"][:, 0].sum(-1).tolist() == lengths
    assert torch.equal(tensors["responses"] > 0, tensors["response_mask"].bool())
    first = tensors["responses"][:, 0, 0]
    assert (first % 100).tolist() == rows, "another prompt's answer"
    assert tensors["chosen_ref_log_prob"].tolist() == [-row for row in rows]
    assert tensors["rejected_ref_log_prob"].tolist() == [-10 * row for row in rows]
    student.steps += 1
    student.samples_seen += len(rows)
    return (first // 100 - 1).tolist()


def test_once_means_from_the_first_weights_for_ever():
    student = FakeStudent("once")
    rejected = rejected_of(student)
    assert [step(student, rejected, rows) for rows in ([4, 0], [3, 1], [2, 2], [0, 4])] == [[0, 0]] * 4
    # Five prompts, two at once, each call with a seed of its own: 3 + 1000, then on.
    assert student.calls == [(1003, 2), (1004, 2), (1005, 1)]


def test_every_epoch_has_its_own_and_a_batch_may_reach_into_the_next():
    """Epochs of five rows in batches of two: the third step has the first epoch's last row and the second's first, and
    the same row may be both; the second epoch's answers are written by the weights at hand then, two steps old."""
    student = FakeStudent("epoch")
    rejected = rejected_of(student)
    assert [step(student, rejected, rows) for rows in ([4, 0], [3, 1], [2, 2], [0, 4], [3, 1], [2, 0])] == [
        *([0, 0], [0, 0], [0, 2], [2, 2], [2, 2]),
        [5, 5],
    ]
    assert [seed for seed, _ in student.calls] == list(range(1003, 1012)), "no seed comes twice"


def test_a_batch_larger_than_the_data_spans_several_epochs():
    student = FakeStudent("epoch")
    assert step(student, rejected_of(student), [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 2]) == [0] * 11
    assert len(student.calls) == 9


def test_an_engine_that_needs_a_push_per_call_gets_more_prompts_in_each():
    student = FakeStudent(max_num_seqs=1, drops_weights=True)
    step(student, rejected_of(student), [0])
    assert [prompts for _, prompts in student.calls] == [4, 1]


@pytest.mark.parametrize("resample", ["once", "epoch"])
def test_a_restart_draws_nothing_again(resample, tmp_path):
    steps = ([4, 0], [3, 1], [2, 2], [0, 4], [3, 1], [2, 0])
    whole, student = FakeStudent(resample), FakeStudent(resample)
    rejected = rejected_of(whole)
    expected = [step(whole, rejected, rows) for rows in steps]
    rejected, seen = rejected_of(student), []
    for rows in steps:
        seen.append(step(student, rejected, rows))
        rejected.save(tmp_path / "rejected.safetensors")
        rejected = rejected_of(student)
        rejected.load(tmp_path / "rejected.safetensors")
    assert seen == expected
    assert student.calls == whole.calls


def test_files_that_do_not_belong_to_the_run(tmp_path):
    student = FakeStudent()
    rejected = rejected_of(student)
    with pytest.raises(FileNotFoundError, match="another stage's"):
        rejected.load(tmp_path / "rejected.safetensors")
    step(student, rejected, [0])
    rejected.save(tmp_path / "rejected.safetensors")
    student.config.data.max_response_length = WIDTH - 1
    with pytest.raises(ValueError, match=f"an answer of {WIDTH} tokens, more than data.max_response_length=3"):
        rejected.load(tmp_path / "rejected.safetensors")
    student.config.data.max_response_length = WIDTH
    strangers = prompts_of([0, 1], index=np.array([10, 11], dtype=object))
    with pytest.raises(ValueError, match=r"no rejected answers to data rows \[11\]"):
        rejected.of(strangers, 0, 0)


def test_equal_pairs_are_those_of_the_same_tokens():
    """The teacher's answer is 7, 7. What stands in the padding does not count; a longer answer, or a shorter, does."""
    batch = DataProto.from_single_dict(collate([0, 1, 2, 3]))
    batch.union(
        DataProto.from_dict(
            {
                "responses": torch.tensor([[7, 7, 9, 9], [7, 7, 7, 0], [7, 0, 0, 0], [7, 8, 0, 0]]).unsqueeze(1),
                "response_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).unsqueeze(1),
            }
        )
    )
    assert equal_pairs(batch).tolist() == [True, False, False, False]


def test_what_was_saved_before_the_first_draw_is_drawn_after_the_restart(tmp_path):
    """The weights of step 0 may be kept as the best before any answer is drawn."""
    rejected_of(FakeStudent()).save(tmp_path / "rejected.safetensors")
    rejected = rejected_of(FakeStudent())
    rejected.load(tmp_path / "rejected.safetensors")
    assert rejected.epoch == -1 and rejected.answers == {}
