"""Room that small models have for larger micro-batches, in which they are updated sooner.

The host takes as long to queue the kernels of a small micro-batch as of a large one, and a small model's are over
before the next are queued. An update of 135M on an H200 (127,000 tokens): 0.5 s in micro-batches of 16,384 tokens,
0.31 of 32,768 and of 65,536, 0.27 of 131,072 (`benchmarks/README.md`).
"""

from __future__ import annotations

from verl.memory.estimate import RunSettings, estimate_memory, gathered_whole, turned
from verl.memory.knobs import POLICY, Knob
from verl.models.shape import ModelShape

ENOUGH_TOKENS = 32_768
# Of the GPU's memory, the rest of which is for what the estimate leaves out.
FILLED = 0.8


def larger_micro_batches(
    run: RunSettings, actor: ModelShape, critic: ModelShape | None, gpu_bytes: float
) -> tuple[list[Knob], RunSettings]:
    """The settings that give models which are gathered whole micro-batches of `ENOUGH_TOKENS` tokens, where these fit
    and are smaller, and the run with them. A batch that is one micro-batch stays one."""
    policy, found = run.actor_rollout_ref, []
    parts = [("update_actor", f"{POLICY}.actor", policy.actor, policy.actor.fsdp_config, actor)]
    if critic is not None:
        parts.append(("update_critic", "critic", run.critic, run.critic.model.fsdp_config, critic))
    for phase, key, part, fsdp, shape in parts:
        if not (part.use_dynamic_bsz and gathered_whole(shape, fsdp)):
            continue
        knob = Knob(f"{key}.ppo_max_token_len_per_gpu", part.ppo_max_token_len_per_gpu, ENOUGH_TOKENS)
        larger = turned(run, knob)
        now, then = (estimate_memory(one, actor, critic, gpu_bytes).need(phase) for one in (run, larger))
        # More memory is what larger micro-batches take, and smaller ones or no others do not.
        if now < then <= FILLED * gpu_bytes:
            found.append(knob)
            run = larger
    return found, run
