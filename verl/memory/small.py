"""Room that small models have for larger micro-batches, in which they are updated sooner.

The host takes as long to queue the kernels of a small micro-batch as of a large one, and a small model's are over
before the next are queued. What was measured stands in `benchmarks/README.md`.
"""

from __future__ import annotations

from verl.memory.estimate import RunSettings, estimate_memory, micro_batch_tokens, turned
from verl.memory.knobs import POLICY, Knob
from verl.models.shape import ModelShape

SMALL_MODEL = 300_000_000
ENOUGH_TOKENS = 32_768
# Of the GPU's memory, the rest of which is for what the estimate leaves out.
FILLED = 0.8


def larger_micro_batches(
    run: RunSettings, actor: ModelShape, critic: ModelShape | None, gpu_bytes: float
) -> tuple[list[Knob], RunSettings]:
    """The settings that give models of fewer than `SMALL_MODEL` parameters micro-batches of `ENOUGH_TOKENS` tokens,
    where theirs are smaller and these take `FILLED` of the GPU at most, and the run with them. A batch that is one
    micro-batch stays one."""
    parts = [("update_actor", f"{POLICY}.actor", run.actor_rollout_ref.actor, actor)]
    if critic is not None:
        parts.append(("update_critic", "critic", run.critic, critic))
    found = []
    for phase, key, part, shape in parts:
        knob = Knob(f"{key}.ppo_max_token_len_per_gpu", part.ppo_max_token_len_per_gpu, ENOUGH_TOKENS)
        larger = turned(run, knob)
        if shape.parameters >= SMALL_MODEL or micro_batch_tokens(larger, phase) <= micro_batch_tokens(run, phase):
            continue
        if estimate_memory(larger, actor, critic, gpu_bytes).need(phase) <= FILLED * gpu_bytes:
            found.append(knob)
            run = larger
    return found, run
