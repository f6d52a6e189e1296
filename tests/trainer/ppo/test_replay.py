"""The replay buffer: what it keeps, what it draws, and that it survives a restart."""

from __future__ import annotations

import pytest
import torch

from verl.config.critic import past_groups
from verl.protocol import DataProto
from verl.trainer.ppo.replay import ReplayBuffer

N = 3


def groups(*numbers: int, answers: int = N, width: int = 4) -> DataProto:
    """One group per number, recognised by its prompt's first token; teacher and answers hold 10 and 100 times it."""
    column = torch.tensor(numbers).unsqueeze(-1)
    return DataProto.from_dict(
        {
            "input_ids": column.expand(-1, 2).contiguous(),
            "attention_mask": torch.ones(len(numbers), 2, dtype=torch.long),
            "teacher_response": (10 * column).expand(-1, width).contiguous(),
            "teacher_attention_mask": torch.ones(len(numbers), 2 + width, dtype=torch.long),
            "responses": (100 * column).unsqueeze(-1).expand(-1, answers, width).contiguous(),
            "response_mask": torch.ones(len(numbers), answers, width, dtype=torch.long),
            "old_log_probs": torch.zeros(len(numbers), answers, width),
        }
    )


def names(data: DataProto) -> list[int]:
    return data.batch["input_ids"][:, 0].tolist()


def test_the_oldest_groups_make_room():
    buffer = ReplayBuffer(capacity=4 * N + 1, seed=0)  # room for four whole groups
    buffer.add(groups(1, 2, 3))
    buffer.add(groups(4, 5))
    assert len(buffer) == 4
    assert sorted(names(buffer.draw(4, step=0))) == [2, 3, 4, 5]


def test_a_past_answer_stays_with_its_prompt_and_its_teacher():
    buffer = ReplayBuffer(capacity=100, seed=0)
    buffer.add(groups(1, 2, 3, 4, 5))
    drawn = buffer.draw(3, step=7)
    assert len(set(names(drawn))) == 3
    assert set(drawn.batch.keys()) == set(groups(1).batch.keys()) - {"old_log_probs"}
    for name, row in zip(names(drawn), range(3), strict=True):
        assert drawn.batch["teacher_response"][row].tolist() == [10 * name] * 4
        assert drawn.batch["responses"][row].tolist() == [[100 * name] * 4] * N
        assert drawn.batch["responses"].dtype == torch.long


def test_draws_depend_on_seed_and_step_alone():
    buffers = [ReplayBuffer(capacity=100, seed=seed) for seed in (0, 0, 1)]
    for buffer in buffers:
        buffer.add(groups(*range(20)))
    first, same, other = (names(buffer.draw(8, step=3)) for buffer in buffers)
    assert first == same == names(buffers[0].draw(8, step=3))
    assert first != other
    assert first != names(buffers[0].draw(8, step=4))


def test_nothing_is_drawn_before_there_is_enough():
    buffer = ReplayBuffer(capacity=100, seed=0)
    assert buffer.draw(1, step=0) is None
    buffer.add(groups(1, 2))
    assert buffer.draw(3, step=0) is None


def test_contents_survive_on_disk(tmp_path):
    buffer, restored = (ReplayBuffer(capacity=100, seed=0) for _ in range(2))
    buffer.save(tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()
    restored.load(tmp_path / "r.safetensors")
    assert len(restored) == 0
    buffer.add(groups(1, 2, 3))
    buffer.save(tmp_path / "r.safetensors")
    restored.load(tmp_path / "r.safetensors")
    assert names(restored.draw(2, step=5)) == names(buffer.draw(2, step=5))


def test_another_shape_is_refused():
    buffer = ReplayBuffer(capacity=100, seed=0)
    buffer.add(groups(1))
    with pytest.raises(ValueError, match=r"responses of shape \(3, 4\).*\(2, 4\).*rollout.n"):
        buffer.check_shapes(groups(2, answers=2))


@pytest.mark.parametrize(
    ("mini_batch", "fraction", "ranks", "expected"),
    [
        (8, 0.5, 1, 8),  # as many past as fresh
        (8, 0.25, 1, 3),  # 8 / 3 = 2.67
        (8, 0.25, 2, 2),  # 1.33 on each rank
        (8, 0.8, 4, 32),
        (8, 0.0, 1, 0),
        (8, 0.05, 1, 0),  # 0.42 of a group
    ],
)
def test_past_groups(mini_batch, fraction, ranks, expected):
    assert past_groups(mini_batch, fraction, ranks) == expected


def test_a_smaller_capacity_after_a_restart_keeps_the_newest(tmp_path):
    buffer = ReplayBuffer(capacity=100, seed=0)
    buffer.add(groups(1, 2, 3))
    buffer.save(tmp_path / "r.safetensors")
    smaller, none = ReplayBuffer(capacity=2 * N, seed=0), ReplayBuffer(capacity=0, seed=0)
    for restored in (smaller, none):
        restored.load(tmp_path / "r.safetensors")
    assert sorted(names(smaller.draw(2, step=0))) == [2, 3]
    assert len(none) == 0
