"""What vLLM's scheduler does at every step for every answer, where most of them need nothing but their next token.

It is Python on the host, and where a step of the model takes less time than it does, the GPU waits. Three parts of it
are left out where nothing comes of them: `room`, `tokens`, `plain_requests`. What the model is told stays the same, to
the order of the requests.
"""

from __future__ import annotations

from vllm import LLM
from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from verl.workers.rollout.vllm_rollout.plain_requests import schedule_together
from verl.workers.rollout.vllm_rollout.room import ask_once_a_block
from verl.workers.rollout.vllm_rollout.tokens import take_tokens_quickly


def scheduler_of(llm: LLM) -> Scheduler:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def make_lean(scheduler: Scheduler) -> bool:
    """Leave all of that out that can be; returns whether all can.

    Nothing can with schedulers or caches of kinds that are not known here, nor where several steps may be on their way
    at once, as in pipelines: a block would be found a step later.
    """
    if not _of_usual_kind(scheduler) or scheduler.vllm_config.parallel_config.pipeline_parallel_size > 1:
        return False
    ask_once_a_block(scheduler.kv_cache_manager)
    take_tokens_quickly(scheduler)
    return schedule_together(scheduler)


def _of_usual_kind(scheduler: Scheduler) -> bool:
    """Whether it is vLLM's own, of CPUs or of GPUs, and all layers are of one kind, which keeps every block it has."""
    manager = scheduler.kv_cache_manager
    kinds = type(manager), type(manager.coordinator), type(manager.coordinator.single_type_managers[0])
    usual = KVCacheManager, UnitaryKVCacheCoordinator, FullAttentionManager
    return type(scheduler) in (Scheduler, AsyncScheduler) and kinds == usual


def make_whole(scheduler: Scheduler) -> None:
    """Have it as vLLM has it."""
    vars(scheduler.kv_cache_manager).pop("allocate_slots", None)
    for name in ("_update_request_with_output", "schedule", "_update_after_schedule"):
        vars(scheduler).pop(name, None)
