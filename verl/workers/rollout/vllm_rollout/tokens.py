"""The tokens that come out of the engine's model, taken with as little as most of them need.

For every token of every answer vLLM's scheduler looks whether a block of the KV cache is full, and has a name then that
other prompts find it by, and in several ways whether the answer ends. Where a step of the model takes less time than
the scheduler needs for all answers, the GPU waits for that.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import Request, RequestStatus


def take_tokens_quickly(scheduler: Scheduler) -> None:
    """Let the scheduler write an answer's next token down, and do what vLLM's own way does besides only for a token
    that fills a block or ends the answer.

    Everything comes out as without it. Several tokens at once, an answer that lost its blocks while its token was on
    the way, and requests with a shortest length or a search for repetition go vLLM's own way.
    """
    manager = scheduler.kv_cache_manager
    # The one that schedules ahead of the tokens lets others find a block only once all of its tokens are known.
    ahead, longest = type(scheduler) is AsyncScheduler, scheduler.max_model_len
    named_size, of_blocks = manager.block_pool.hash_block_size, manager.coordinator.single_type_managers[0]
    size, found = of_blocks.block_size, of_blocks.num_cached_block
    own_way = scheduler._update_request_with_output

    def update(request: Request, new_token_ids: list[int], **more: Any) -> tuple[list[int], bool]:
        limits = request.sampling_params
        if (
            len(new_token_ids) != 1
            or request.status is not RequestStatus.RUNNING
            or limits.min_tokens
            or limits.repetition_detection is not None
            or more.get("is_stale")
            or getattr(request, "async_tokens_to_discard", 0)
        ):
            return own_way(request, new_token_ids, **more)
        token, written, tokens = new_token_ids[0], request._output_token_ids, request._all_token_ids
        written.append(token)
        tokens.append(token)
        if len(tokens) // named_size > len(request.block_hashes):
            request.update_block_hashes()
        stopped = (
            token == limits.eos_token_id
            or token in (limits.stop_token_ids or ())
            or len(written) >= request.max_tokens
            or len(tokens) >= longest
        ) and check_stop(request, longest)
        if ahead:
            request.num_output_placeholders -= 1
            known = request.num_computed_tokens - request.num_output_placeholders
            if known // size > found.get(request.request_id, 0):
                manager.cache_blocks(request, known)
        return new_token_ids, stopped

    scheduler._update_request_with_output = update
