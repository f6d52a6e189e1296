"""The scheduler looks at answers that need more than a token, and asks for room where a block fills or begins, as often
as by hand; all that the model is told, and all that comes of it, is as before."""

from random import Random

import pytest
import torch

from tests.vllm.tiny_engine import GREEDY, LIMIT, prompts, real_tokens, running_engine, sampled, tiny_model

pytestmark = pytest.mark.vllm

# The blocks of vLLM's CPU build. Behind a prompt seven of an answer's eight tokens are put in: the block is full with
# the 128th token, and the next one begins with the 129th.
BLOCK = 128
LENGTHS_AND_CALLS = {126: 2, 128: 1, 121: 1, 200: 0, 3: 0}
LENGTHS = list(LENGTHS_AND_CALLS)


@pytest.fixture
def engine(alone, monkeypatch):
    """An engine with weights, whose answers all have `LIMIT` tokens."""
    running = running_engine(True)
    running.push_weights(tiny_model().named_parameters())
    monkeypatch.setattr(running, "eos_token_ids", [])
    return running


@pytest.fixture
def scheduler(engine):
    from verl.workers.rollout.vllm_rollout.scheduling import make_lean, make_whole, scheduler_of

    yield scheduler_of(engine.llm)
    make_whole(scheduler_of(engine.llm))
    make_lean(scheduler_of(engine.llm))


@pytest.fixture
def manager(scheduler):
    return scheduler.kv_cache_manager


@pytest.fixture
def asked(monkeypatch):
    """Names of the requests that vLLM's own way was asked for."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    names, whole = [], KVCacheManager.allocate_slots

    def allocate_slots(self, request, *args, **more):
        names.append(request.request_id)
        return whole(self, request, *args, **more)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", allocate_slots)
    return names


def test_the_manager_is_asked_for_prompts_and_for_blocks(engine, manager, scheduler, asked):
    from verl.workers.rollout.vllm_rollout.scheduling import make_whole

    assert manager.coordinator.block_size == BLOCK
    answers = engine.generate(prompts(LENGTHS), GREEDY, seed=0)
    assert [len(answer) for answer in real_tokens(answers)] == [LIMIT] * len(LENGTHS)
    assert len(asked) == len(LENGTHS) + sum(LENGTHS_AND_CALLS.values())
    asked.clear()
    make_whole(scheduler)
    engine.generate(prompts(LENGTHS), GREEDY, seed=0)
    assert len(asked) == len(LENGTHS) * LIMIT


@pytest.mark.parametrize("ends", [range(0), range(0, 200, 3)])
def test_answers_are_the_same(engine, manager, scheduler, ends, monkeypatch):
    from vllm.v1.request import Request

    from verl.workers.rollout.vllm_rollout.scheduling import make_whole

    taken, whole = [], Request.append_output_token_ids
    monkeypatch.setattr(Request, "append_output_token_ids", lambda *args: (taken.append(args), whole(*args)))
    monkeypatch.setattr(engine, "eos_token_ids", list(ends))
    free = manager.block_pool.get_num_free_blocks()
    drawn = [engine.generate(prompts(LENGTHS), sampled(3), seed=7)]
    assert manager.block_pool.get_num_free_blocks() == free
    assert not taken
    make_whole(scheduler)
    drawn.append(engine.generate(prompts(LENGTHS), sampled(3), seed=7))
    lengths = [len(answer) for answer in real_tokens(drawn[1])]
    assert len(taken) == sum(lengths)
    assert (set(lengths) == {LIMIT}) == (not ends)
    assert torch.equal(*(batch.batch["responses"] for batch in drawn))
    assert torch.equal(*(batch.batch["response_mask"] for batch in drawn))


# ---- schedules, without a model


@pytest.fixture(scope="module")
def schedules():
    from tests.vllm import schedules

    return schedules


@pytest.mark.parametrize("kind", ["sync", "async", "newer"])
def test_schedules_are_the_same(kind, schedules, tmp_path_factory):
    lost, looked_at, folder = 0, [0, 0], tmp_path_factory.mktemp("config")
    for seed in range(32):
        draw = Random(seed)
        sizes = draw.choice([32, 40, 100, 512]), draw.choice([40, 60, 400])
        (expected, looks), (found, fewer) = (
            schedules.schedule(kind, folder, *sizes, schedules.some_requests(Random(seed)), lean)
            for lean in (False, True)
        )
        assert found == expected, seed
        looked_at = [looked_at[0] + looks, looked_at[1] + fewer]
        lost += sum(len(step[-1]) for step in expected)
    assert lost, "blocks must be scarce for this to prove everything"
    assert looked_at[1] < 0.7 * looked_at[0], "few of these requests are many at a time, and yet"


@pytest.mark.parametrize(("layers", "expected"), [("all", True), ("windows", False), ("both", False)])
def test_layers_that_give_blocks_back_are_left_alone(layers, expected, schedules, tmp_path_factory):
    from verl.workers.rollout.vllm_rollout.scheduling import make_lean, make_whole

    scheduler = schedules.scheduler_of(layers, tmp_path_factory.mktemp("config"))
    changed = {"schedule", "_update_after_schedule", "_update_request_with_output"}
    assert make_lean(scheduler) == expected
    assert changed & set(vars(scheduler)) == (changed if expected else set())
    assert ("allocate_slots" in vars(scheduler.kv_cache_manager)) == expected
    make_whole(scheduler)
    assert not changed & set(vars(scheduler)) and "allocate_slots" not in vars(scheduler.kv_cache_manager)
