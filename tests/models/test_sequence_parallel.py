"""Packed tokens over several ranks: which token is whose, and models whose values and gradients do not depend on it."""

from types import SimpleNamespace

import pytest
import torch

from tests.models import sequence_parallel_ranks
from tests.recent_families import FAMILIES as RECENT
from tests.tiny import answer_rows, causal_lm
from verl.models.answer_models import PolicyModel
from verl.models.packing import pack
from verl.models.sequence_parallel import Shard, check_shared_heads, own_shard


def shard(rank: int, size: int) -> Shard:
    """One that nothing travels through."""
    return Shard(rank, size, group=None)


def test_every_rank_has_every_nth_token_with_its_own_position():
    # One prompt of 3 tokens with answers of 2 and 1, and a row of 1 + 1: 8 tokens. On three ranks, one is missing.
    rows = answer_rows([3, 3, 1], [2, 1, 1])
    rows.prompts[1] = rows.prompts[0]
    packed = pack(rows)
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert packed.answer_index.tolist() == [3, 4, 5, 7] and packed.before_index.tolist() == [2, 3, 2, 6]
    parts = [packed.of(shard(rank, 3), before=True) for rank in range(3)]
    tokens = packed.input_ids[0].tolist()
    assert [part.input_ids.tolist() for part in parts] == [
        [[tokens[0], tokens[3], tokens[6]]], [[tokens[1], tokens[4], tokens[7]]], [[tokens[2], tokens[5], 0]],
    ]  # fmt: skip
    assert [part.position_ids.tolist() for part in parts] == [[[0, 3, 0]], [[1, 4, 1]], [[2, 3, 0]]]
    # The tokens before the answers' are 2, 3, 2 and 6: in the last rank's first place, and in the first rank's second
    # and third.
    assert [part.before_index.tolist() for part in parts] == [[1, 2], [], [0, 0]]
    assert [part.answer_ids.tolist() for part in parts] == [[tokens[4], tokens[7]], [], [tokens[3], tokens[5]]]
    assert [part.grid_index.tolist() for part in parts] == [[1, 4], [], [0, 2]]
    assert {part.layout.tokens for part in parts} == {8}
    # The answers' own: 3, 4, 5 and 7.
    parts = [packed.of(shard(rank, 3), before=False) for rank in range(3)]
    assert [part.answer_index.tolist() for part in parts] == [[1], [1, 2], [1]]
    assert [part.grid_index.tolist() for part in parts] == [[0], [1, 4], [2]]
    assert all(len(part.before_index) == 0 for part in parts)


def test_heads_belong_to_ranks_in_their_order():
    sinks = torch.arange(6.0)
    assert [shard(rank, 3).heads(sinks).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_heads_that_cannot_be_shared_are_refused():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=6))
    check_shared_heads(config, 3)
    with pytest.raises(ValueError, match="its 6 attention heads cannot be shared by 4 ranks"):
        check_shared_heads(config, 4)
    # A class whose config does not count its heads is refused by its first layer.
    model = PolicyModel(causal_lm(), proven=True)
    model.shard = shard(0, 3)
    with pytest.raises(ValueError, match="its 4 attention heads cannot be shared by 3 ranks"):
        model(answer_rows([3], [2]))


def test_ranks_that_do_not_divide_into_groups_are_refused():
    assert own_shard(1) is None
    with pytest.raises(ValueError, match="a number of ranks that divides into groups of 2, got 1"):
        own_shard(2)


RECENT_MODELS = [f"policy/{family}" for family in RECENT]
MODELS = {
    # Two ranks and four: as many key heads as ranks, and half as many.
    2: ["policy/qwen2", "policy/qwen3", "policy/llama", "score/qwen2", "policy/qwen2/recomputed",
        "policy/qwen2/compiled", *RECENT_MODELS, "score/gpt_oss", "score/qwen3_next"],
    4: ["policy/qwen2", "score/qwen2", "policy/gpt_oss", "policy/gemma2", "policy/qwen3_next/recomputed"],
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", MODELS)
def test_values_and_gradients_are_those_of_hugging_face(ranks, tmp_path):
    """Attention with windows, caps, sinks and shared key heads, and layers that carry a state along a row, on ranks
    that share prompts and answers of every length."""
    torch.multiprocessing.spawn(sequence_parallel_ranks.run, args=(ranks, MODELS[ranks], tmp_path), nprocs=ranks)
