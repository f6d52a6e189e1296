"""Room in the engine's KV cache, asked for where it may be lacking.

For every token of every answer vLLM's scheduler has the manager of the KV cache count the blocks that the answer has
and those that it needs. A block holds 16 tokens or more, so nearly always there is room. Where a step of the model
takes less time than the scheduler needs for all answers, the GPU waits for that.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

# What the scheduler says besides of a request that runs already.
RUNNING = {"num_lookahead_tokens": 0}


def has_plain_blocks(manager: KVCacheManager) -> bool:
    """Whether all layers are of one kind, which keeps every block that it has."""
    kinds = type(manager), type(manager.coordinator), type(manager.coordinator.single_type_managers[0])
    return kinds == (KVCacheManager, UnitaryKVCacheCoordinator, FullAttentionManager)


def ask_once_a_block(manager: KVCacheManager) -> bool:
    """Let the manager look at a request's blocks only when its next tokens fill the last of them, which is then there
    for other prompts to find, or need another.

    Everything comes out as without it. Layers that give blocks back as they go, or that are of several kinds, are left
    as they are.

    Returns:
        Whether the manager does so from now on.
    """
    if not has_plain_blocks(manager):
        return False
    of_blocks = manager.coordinator.single_type_managers[0]
    blocks, size, none = of_blocks.req_to_blocks, of_blocks.block_size, manager.empty_kv_cache_blocks

    def allocate_slots(request: Request, num_new_tokens: int, **more: Any) -> KVCacheBlocks | None:
        if more == RUNNING:
            room = len(blocks.get(request.request_id, ())) * size
            if request.num_computed_tokens + num_new_tokens < room:
                return none
        return KVCacheManager.allocate_slots(manager, request, num_new_tokens, **more)

    manager.allocate_slots = allocate_slots
    return True
