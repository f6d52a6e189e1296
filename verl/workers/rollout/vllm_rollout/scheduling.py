"""What vLLM's scheduler does at every step for every answer, where most of them need nothing but their next token.

It is Python on the host, and where a step of the model takes less time than it does, the GPU waits. Three parts of it
are left out where nothing comes of them: `room`, `tokens`, `plain_requests`. What the model is told stays the same, to
the order of the requests.
"""

from __future__ import annotations

from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler

from verl.workers.rollout.vllm_rollout.plain_requests import schedule_together
from verl.workers.rollout.vllm_rollout.room import ask_once_a_block
from verl.workers.rollout.vllm_rollout.tokens import take_tokens_quickly


def scheduler_of(llm: LLM) -> Scheduler:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def make_lean(scheduler: Scheduler) -> bool:
    """Leave all of that out that can be; returns whether all can, as with schedulers and caches of the usual kind.

    Nothing where several steps may be on their way at once, as in pipelines: a block would be found a step later.
    """
    if scheduler.vllm_config.parallel_config.pipeline_parallel_size > 1:
        return False
    done = ask_once_a_block(scheduler.kv_cache_manager), take_tokens_quickly(scheduler), schedule_together(scheduler)
    return all(done)


def make_whole(scheduler: Scheduler) -> None:
    """Have it as vLLM has it."""
    vars(scheduler.kv_cache_manager).pop("allocate_slots", None)
    for name in ("_update_request_with_output", "schedule", "_update_after_schedule"):
        vars(scheduler).pop(name, None)
