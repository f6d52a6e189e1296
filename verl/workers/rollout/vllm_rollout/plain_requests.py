"""Answers that need nothing but their next token, scheduled together.

For every answer, at every step, vLLM's scheduler looks at whatever a request could need. Once the prompts are read, an
answer needs one token, and now and then a block of the KV cache. So vLLM's own way is gone with the answers that
need more than a token, and the others are joined to what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from verl.workers.rollout.vllm_rollout.room import room_beyond

# What the engine's model is told about requests that it knows.
TOLD = {
    *("req_ids", "resumed_req_ids", "new_token_ids", "all_token_ids", "new_block_ids"),
    *("num_computed_tokens", "num_output_tokens"),
}


def schedule_together(scheduler: Scheduler) -> bool:
    """Let the scheduler join requests that need one token, and have room for it, without a look at each.

    Every step comes out as without it, to the order of its requests. Steps with requests that wait, or with fewer free
    blocks than there are requests that may take one, go vLLM's own way as a whole, as all do with adapters of vLLM's,
    speculation and connectors.

    Returns:
        Whether the scheduler does so from now on.
    """
    told = {field.name for field in fields(CachedRequestData)}
    beyond = (
        *(scheduler.connector, scheduler.ec_connector, scheduler.lora_config, scheduler.is_encoder_decoder),
        # The last one came after 0.26.
        *(scheduler.vllm_config.speculative_config, getattr(scheduler, "aux_output_connector", None)),
    )
    if told != TOLD or any(beyond):
        return False
    joining = _Joining(scheduler, room_beyond(scheduler.kv_cache_manager))
    scheduler.schedule, scheduler._update_after_schedule = joining.schedule, joining.update_after_schedule
    return True


@dataclass
class _Joining:
    """The two ways into a scheduler, and between them the requests of a step: all, and the names of those to join."""

    scheduler: Scheduler
    has_room: Callable[[Request, int], bool]
    running: list[Request] | None = None
    plain: set[str] | None = None

    def schedule(self, *args: Any, **more: Any) -> SchedulerOutput:
        scheduler, whole = self.scheduler, type(self.scheduler).schedule
        running = scheduler.running
        alone = [] if self._own_way(args, more) else self._needing_more(running)
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        if not alone or len(alone) == len(running) or len(alone) > free:
            return whole(scheduler, *args, **more)
        names = {request.request_id for request in alone}
        self.running, self.plain = running, {one.request_id for one in running} - names
        scheduler.running = alone
        try:
            return whole(scheduler, *args, **more)
        finally:
            scheduler.running, self.running, self.plain = running, None, None

    def update_after_schedule(self, step: SchedulerOutput) -> None:
        """vLLM's own, with all requests; it counts their tokens."""
        if self.running is not None:
            self._join(step)
        type(self.scheduler)._update_after_schedule(self.scheduler, step)

    def _own_way(self, args: tuple[Any, ...], more: dict[str, Any]) -> bool:
        """Whether a step is one of which more is to be thought of: requests that wait, prompts that are put off."""
        scheduler = self.scheduler
        return (
            any(args)
            or any(more.values())
            or scheduler.pause_state is not PauseState.UNPAUSED
            or bool(scheduler.get_request_counts()[1])
        )

    def _needing_more(self, running: list[Request]) -> list[Request]:
        """Those that need a look: the first, by whose blocks vLLM finds a common prefix; answers whose last token is on
        its way; and where a block fills or begins, as in `room`. None where prompts share the step's tokens."""
        scheduler, has_room, longest = self.scheduler, self.has_room, self.scheduler.max_model_len
        # vLLM's older model runner is told all tokens of a request that was left out of the step before, as in a pause.
        known = None if scheduler.use_v2_model_runner else scheduler.prev_step_scheduled_req_ids
        alone = []
        for request in running:
            name, done, ahead = request.request_id, request.num_computed_tokens, request.num_output_placeholders
            tokens = len(request._all_token_ids) + ahead - done
            if tokens > 1 or request.is_prefill_chunk:
                return []
            if (
                not alone
                or tokens != 1
                or not has_room(request, 1)
                or done + 2 > longest
                or (ahead and done + 2 - ahead >= request.num_prompt_tokens + request.max_tokens)
                or request.mm_features
                or (known is not None and name not in known)
            ):
                alone.append(request)
        return alone

    def _join(self, step: SchedulerOutput) -> None:
        """Put the plain requests where they would have been."""
        told, taken, plain = step.scheduled_cached_reqs, step.num_scheduled_tokens, self.plain
        places = {name: place for place, name in enumerate(told.req_ids)}
        names, tokens, blocks, computed, written = [], {}, [], [], []
        for request in self.running:
            name = request.request_id
            if name in plain:
                tokens[name] = 1
                blocks.append(None)
                computed.append(request.num_computed_tokens)
                written.append(len(request._output_token_ids) + request.num_output_placeholders)
            elif name in places:
                place = places[name]
                tokens[name] = taken[name]
                blocks.append(told.new_block_ids[place])
                computed.append(told.num_computed_tokens[place])
                written.append(told.num_output_tokens[place])
            else:
                continue
            names.append(name)
        told.req_ids, told.new_block_ids, told.num_computed_tokens, told.num_output_tokens = (
            names, blocks, computed, written,
        )  # fmt: skip
        step.num_scheduled_tokens = tokens
        step.total_num_scheduled_tokens += len(plain)
        if not self.scheduler.use_v2_model_runner:
            self.scheduler.prev_step_scheduled_req_ids.update(plain)
