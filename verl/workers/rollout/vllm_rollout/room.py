"""Room in the engine's KV cache, asked for where it may be lacking.

For every token of every answer vLLM's scheduler has the manager of the KV cache count the blocks that the answer has
and those that it needs. A block holds 16 tokens or more, so nearly always there is room. Where a step of the model
takes less time than the scheduler needs for all answers, the GPU waits for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

# What the scheduler says besides of a request that runs already.
RUNNING = {"num_lookahead_tokens": 0}


def room_beyond(manager: KVCacheManager) -> Callable[[Request, int], bool]:
    """A function of a request and its next tokens: whether its last block has room for more than these. Where not, they
    fill it, and it is there for other prompts to find, or they need another."""
    of_blocks = manager.coordinator.single_type_managers[0]
    blocks, size = of_blocks.req_to_blocks, of_blocks.block_size

    def has_room(request: Request, new_tokens: int) -> bool:
        return request.num_computed_tokens + new_tokens < len(blocks.get(request.request_id, ())) * size

    return has_room


def ask_once_a_block(manager: KVCacheManager) -> None:
    """Let the manager look at a request's blocks only where a block is filled or begins; everything comes out as
    without it."""
    has_room, none = room_beyond(manager), manager.empty_kv_cache_blocks

    def allocate_slots(request: Request, num_new_tokens: int, **more: Any) -> KVCacheBlocks | None:
        if more == RUNNING and has_room(request, num_new_tokens):
            return none
        return KVCacheManager.allocate_slots(manager, request, num_new_tokens, **more)

    manager.allocate_slots = allocate_slots
