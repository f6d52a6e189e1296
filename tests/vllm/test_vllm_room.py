"""Room in the KV cache is asked for once a block: as few questions as that takes by hand, and the answers as before."""

from functools import cache

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from tests.vllm.tiny_engine import GREEDY, LIMIT, prompts, real_tokens, sampled, start_engine, tiny_model
from verl.workers.rollout.vllm_rollout.room import ask_once_a_block, cache_manager

pytestmark = pytest.mark.vllm

# Those of vLLM's CPU build.
BLOCK = 128
# Of the answers' tokens but the last, which nothing follows, those to 126 and 128 need a second block, in the third and
# the first step behind the prompt; that to 121 ends in its block's last place, that to 200 began in its second.
LENGTHS = [126, 128, 121, 200, 3]
CROSSING = 2


@cache
def running_engine():
    """Kept to the end: an engine that is collected takes the process group with it."""
    return start_engine()


@pytest.fixture
def engine(alone, monkeypatch):
    """An engine with weights, whose answers all have `LIMIT` tokens."""
    running = running_engine()
    running.push_weights(tiny_model().named_parameters())
    monkeypatch.setattr(running, "eos_token_ids", [])
    return running


@pytest.fixture
def manager(engine):
    return cache_manager(engine.llm)


@pytest.fixture
def asked(monkeypatch):
    """Names of the requests that the manager was asked for."""
    names, whole = [], KVCacheManager.allocate_slots

    def allocate_slots(self, request, *args, **more):
        names.append(request.request_id)
        return whole(self, request, *args, **more)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", allocate_slots)
    return names


def asked_for_every_token(manager, monkeypatch):
    """The manager as vLLM has it."""
    monkeypatch.delattr(manager, "allocate_slots")


def test_the_manager_is_asked_for_prompts_and_for_blocks(engine, manager, asked, monkeypatch):
    assert manager.coordinator.block_size == BLOCK
    answers = engine.generate(prompts(LENGTHS), GREEDY, seed=0)
    assert [len(answer) for answer in real_tokens(answers)] == [LIMIT] * len(LENGTHS)
    assert len(asked) == len(LENGTHS) + CROSSING
    asked.clear()
    asked_for_every_token(manager, monkeypatch)
    engine.generate(prompts(LENGTHS), GREEDY, seed=0)
    # The last of a row's tokens is never put in.
    assert len(asked) == len(LENGTHS) * LIMIT


def test_answers_are_the_same(engine, manager, monkeypatch):
    free = manager.block_pool.get_num_free_blocks()
    drawn = [engine.generate(prompts(LENGTHS), sampled(3), seed=7)]
    assert manager.block_pool.get_num_free_blocks() == free
    asked_for_every_token(manager, monkeypatch)
    drawn.append(engine.generate(prompts(LENGTHS), sampled(3), seed=7))
    assert torch.equal(*(batch.batch["responses"] for batch in drawn))
    assert torch.equal(*(batch.batch["response_mask"] for batch in drawn))


def test_answers_are_the_same_where_the_cache_is_too_small_for_all(engine, manager, monkeypatch):
    expected = real_tokens(engine.generate(prompts([126, 127, 128]), GREEDY, seed=0))
    pool, preempted = manager.block_pool, []
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    whole = scheduler._preempt_request

    def preempt(request, *args, **more):
        preempted.append(request.request_id)
        return whole(request, *args, **more)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    reset, held = engine.llm.reset_prefix_cache, []

    def reset_and_fill() -> bool:
        done = reset()
        # Four are left, for six.
        held.extend(pool.get_new_blocks(pool.get_num_free_blocks() - 4))
        return done

    monkeypatch.setattr(engine.llm, "reset_prefix_cache", reset_and_fill)
    try:
        answers = real_tokens(engine.generate(prompts([126, 127, 128]), GREEDY, seed=0))
    finally:
        pool.free_blocks(held)
    assert preempted
    assert answers == expected


@pytest.mark.parametrize(("spec", "expected"), [(FullAttentionSpec, True), (SlidingWindowSpec, False)])
def test_windows_which_give_blocks_back_are_asked_for_at_every_token(spec, expected):
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    window = {"sliding_window": 32} if spec is SlidingWindowSpec else {}
    config = KVCacheConfig(8, [], [KVCacheGroupSpec(["layer"], spec(**sizes, **window))])
    manager = KVCacheManager(config, max_model_len=128, scheduler_block_size=16, hash_block_size=16)
    assert ask_once_a_block(manager) == expected
    assert ("allocate_slots" in vars(manager)) == expected
