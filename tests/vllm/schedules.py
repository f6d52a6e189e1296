"""Schedules of vLLM's own schedulers without a model; imported where vLLM is there alone."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from random import Random

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.vllm.tiny_engine import tiny_model
from verl.workers.rollout.vllm_rollout.scheduling import make_lean

SMALL_BLOCK, MOST_TOKENS = 16, 250
# What the hash of a prompt's first block goes on from: the same for both ways.
init_none_hash(sha256)
# The model's tokens are multiples of it, each step's the next.
TOKENS_APART = 7
# Of CPUs, and of GPUs, which is a step ahead of the answers' tokens; and whether for the newer of the model runners.
SCHEDULERS = {"sync": (Scheduler, False), "async": (AsyncScheduler, False), "newer": (AsyncScheduler, True)}


@cache
def engine_config(folder: Path) -> VllmConfig:
    """The engine's configuration."""
    tiny_model().config.save_pretrained(folder)
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=MOST_TOKENS,
        max_num_seqs=32, max_num_batched_tokens=512, enable_chunked_prefill=True, block_size=SMALL_BLOCK,
    ).create_engine_config()  # fmt: skip


def cache_of(blocks: int, spec=FullAttentionSpec, **window) -> KVCacheConfig:
    layer = spec(block_size=SMALL_BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, **window)
    return KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layer)])


def some_requests(draw: Random) -> list[Request]:
    """Of six prompts, some with several answers, of up to 90 tokens or as many as the model can take; some of them end
    before, at a token that stops them."""
    hasher, copies = get_request_block_hasher(SMALL_BLOCK, sha256), draw.choice([1, 4])
    lengths = [draw.choice([1, 15, 16, 17, 32, 100, draw.randrange(1, 160)]) for _ in range(6)]
    texts = [[draw.randrange(500) for _ in range(length)] for length in lengths]

    def request(number: int) -> Request:
        stops = [TOKENS_APART * draw.randrange(150) % 500 for _ in range(draw.choice([0, 1, 3]))]
        longest = draw.choice([draw.randrange(1, 90), MOST_TOKENS])
        limits = SamplingParams(max_tokens=longest, ignore_eos=True, stop_token_ids=stops)
        return Request(str(number), list(texts[number // copies]), limits, None, block_hasher=hasher)

    return [request(number) for number in range(6 * copies)]


def schedule(
    kind: str, folder: Path, step_tokens: int, blocks: int, requests: list[Request], lean: bool
) -> tuple[list[tuple], int]:
    """Of each step: all that the model is told, in its order, the blocks that each request has, those that are free,
    those that others can find, how each request stands, and who lost their blocks. And how many requests vLLM's own way
    has looked at in all."""
    scheduler_class, newer = SCHEDULERS[kind]
    scheduler = new_scheduler(scheduler_class, engine_config(folder), cache_of(blocks))
    scheduler.use_v2_model_runner, scheduler.max_num_scheduled_tokens = newer, step_tokens
    manager, steps, on_the_way = scheduler.kv_cache_manager, [], []
    if lean:
        assert make_lean(scheduler)
    looks, told = [], scheduler._make_cached_request_data
    scheduler._make_cached_request_data = lambda running, *rest: (looks.append(len(running)), told(running, *rest))[1]
    for request in requests:
        scheduler.add_request(request)
    while scheduler.has_requests() or on_the_way:
        # Now and then the engine is paused for a step.
        paused = len(steps) % 23 == 22
        scheduler.set_pause_state(PauseState.PAUSED_ALL if paused else PauseState.UNPAUSED)
        step = scheduler.schedule()
        scheduler.set_pause_state(PauseState.UNPAUSED)
        held = manager.coordinator.single_type_managers[0].req_to_blocks
        tables = {name: [block.block_id for block in table] for name, table in held.items()}
        free, lost = manager.block_pool.get_num_free_blocks(), sorted(step.preempted_req_ids or ())
        found = {name: list(map(str, block_hashes(table))) for name, table in held.items()}
        stand = [(one.status, one.stop_reason, list(one.all_token_ids), len(one.block_hashes)) for one in requests]
        steps.append((copy.deepcopy(step), list(step.num_scheduled_tokens), tables, free, found, stand, lost))
        if step.num_scheduled_tokens:
            unfinished = {name for name in step.num_scheduled_tokens if scheduler.requests[name].is_prefill_chunk}
            on_the_way.append((step, unfinished))
        ahead = scheduler_class is AsyncScheduler and bool(step.num_scheduled_tokens)
        if len(on_the_way) > ahead:
            done, unfinished = on_the_way.pop(0)
            names = list(done.num_scheduled_tokens)
            tokens = [[] if name in unfinished else [len(steps) * TOKENS_APART % 500] for name in names]
            places = {name: place for place, name in enumerate(names)}
            output = ModelRunnerOutput(
                req_ids=names, req_id_to_index=places, sampled_token_ids=tokens, logprobs=None,
                prompt_logprobs_dict={}, pooler_output=[],
            )  # fmt: skip
            scheduler.update_from_output(done, output)
    assert manager.block_pool.get_num_free_blocks() == blocks - 1, "all but the one that stands for none"
    return steps, sum(looks)


def block_hashes(table) -> list:
    return [block.block_hash for block in table]


def scheduler_of(layers: str, folder: Path) -> Scheduler:
    """Of layers that look at all, at windows, or of both kinds."""
    whole, windows = cache_of(8), cache_of(8, SlidingWindowSpec, sliding_window=32)
    both = KVCacheConfig(8, [], whole.kv_cache_groups + windows.kv_cache_groups)
    return new_scheduler(Scheduler, engine_config(folder), {"all": whole, "windows": windows, "both": both}[layers])


def new_scheduler(scheduler_class: type[Scheduler], config: VllmConfig, cache: KVCacheConfig) -> Scheduler:
    config.cache_config.num_gpu_blocks = cache.num_blocks
    return scheduler_class(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=SMALL_BLOCK, hash_block_size=SMALL_BLOCK,
    )  # fmt: skip
