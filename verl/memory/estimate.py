"""An estimate of the memory a run will need, from its settings and the sizes of its models, before it starts.

The estimate covers the tensors that are large and whose size is known in advance. N is a model's number of parameters,
T of trained ones (N, or with adapters these and a score head), Q of those in 4 bits, b the bytes of a number in the
type it computes in (2 for bf16), S the tokens of the largest possible micro-batch, or of the part of it that a rank
computes where several share its tokens (`ulysses_sequence_parallel_size`).

| set | bytes on each GPU | there while |
|---|---|---|
| weights, fp32 if trained | (4 T + b (N - T - Q)) / ranks + 4.5 / 8 Q | at work; always, without param_offload |
| those of a critic on the actor's base | 4 T / ranks, and the actor's | the same |
| AdamW's two moments, fp32 | 8 T / ranks | updated; always, without optimizer_offload |
| gradients, fp32 | 4 T / ranks; 4 T with sync_gradients_once and several micro-batches | updated |
| gathered layers and their gradients | see `_gathered` | updated |
| activations | S times `layer_bytes_per_token` of each layer | updated |
| capped scores of one row, fp32 | COPIES x 4 heads (of the rank) x (longest row)^2 | updated |
| logits | a chunk, at most CHUNK_BYTES | the actor is updated |
| reference (none with adapters) | b N / ranks | reference log-probs are computed; always, without param_offload |
| vLLM's weights and KV cache | gpu_memory_utilization of the card | generating; always, without free_cache_engine |
| CUDA, NCCL, cuBLAS, fragments | OVERHEAD_BYTES | always |

In the memory of each machine are offloaded weights and states, and with `trainer.async_save` a copy of what checkpoints
hold: 12 T bytes, T / ranks of it for each rank there.

The forward passes without gradients need less than the update that follows them, and are left out, and so is what
adapters keep beside the activations: some ranks of numbers per token and layer, and with DoRA their layers' outputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import ceil, gcd
from pathlib import Path
from typing import Any

import psutil
import torch

from verl.config import (
    ActorConfig,
    ActorRolloutRefConfig,
    CriticConfig,
    FSDPConfig,
    ModelConfig,
    RolloutConfig,
)
from verl.memory.knobs import Knob, Phase, knobs
from verl.models.capped_attention import COPIES
from verl.models.four_bit import BITS_PER_WEIGHT
from verl.models.head_log_probs import CHUNK_BYTES
from verl.models.shape import ModelShape
from verl.utils.units import GIB

logger = logging.getLogger(__name__)

MASTER, MOMENTS, GRADIENT = 4, 8, 4
# An allowance, not a sum: a context and its libraries take about a GiB, and the allocator wastes some.
OVERHEAD_BYTES = 2 * GIB
PHASES: dict[Phase, str] = {
    "generate": "answers are generated",
    "update_actor": "the actor is updated",
    "update_critic": "the critic is updated",
}
Sizes = dict[str, float]
# Where Linux says what a container may use: version 2 of its control groups, and version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class RunSettings:
    """The settings that determine memory use. `critic` is None where there is no discriminator."""

    actor_rollout_ref: ActorRolloutRefConfig
    critic: CriticConfig | None
    use_reference: bool
    ranks: int
    ranks_per_machine: int
    # Whether the actor is trained on pairs of a teacher's and a student's answer.
    pairs: bool = False
    # Whether checkpoints are copied to host memory, to be written in the background.
    async_save: bool = False
    # Whether the critic computes with the actor's frozen weights, and has none of its own.
    share_base: bool = False
    # Whether there is an engine.
    generates: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by name of what takes them: on each GPU in each phase, and in each machine's host memory."""

    phases: dict[Phase, Sizes]
    host: Sizes

    def need(self, phase: Phase) -> float:
        """Bytes on each GPU in a phase."""
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=self.need)

    def sentence(self, gpu_bytes: float, host_bytes: float) -> str:
        """The need of the largest phase, its biggest parts, and that of host memory, each beside what there is."""
        phase = self.largest
        parts = sorted(self.phases[phase].items(), key=lambda part: -part[1])[:5]
        biggest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
        return (
            f"needs about {self.need(phase) / GIB:.1f} GiB of {gpu_bytes / GIB:.1f} GiB on each GPU while "
            f"{PHASES[phase]}; biggest parts: {biggest}; {sum(self.host.values()) / GIB:.1f} of "
            f"{host_bytes / GIB:.1f} GiB of each machine's host memory"
        )


def host_memory(limits: tuple[Path, ...] = CONTAINER_LIMITS) -> int:
    """Bytes of host memory that this machine's processes may use: all of it, or the limit of its container."""
    sizes = [psutil.virtual_memory().total]
    for file in limits:
        text = file.read_text().strip() if file.exists() else "max"
        if text != "max":
            sizes.append(int(text))
    return min(sizes)


def check_memory(
    run: RunSettings, actor: ModelShape, critic: ModelShape | None, gpu_bytes: float, host_bytes: float
) -> MemoryEstimate:
    """Log the estimate, and warn where it exceeds the memory there is, with the savings of each setting.

    Args:
        gpu_bytes: of one card.
        host_bytes: of one machine (see `host_memory`).

    Raises:
        ValueError: weights and optimizer states alone, which are known to the byte, are larger than the card.
    """
    estimate = estimate_memory(run, actor, critic, gpu_bytes)
    logger.info("Memory: the run %s", estimate.sentence(gpu_bytes, host_bytes))
    for phase, parts in estimate.phases.items():
        fixed = sum(size for name, size in parts.items() if name.endswith((" weights", " optimizer states")))
        advice = _savings(run, actor, critic, gpu_bytes, phase)
        if fixed > gpu_bytes:
            raise ValueError(
                f"weights and optimizer states need {fixed / GIB:.1f} GiB on each GPU while {PHASES[phase]}, and it "
                f"has {gpu_bytes / GIB:.1f} GiB: {advice}"
            )
        if estimate.need(phase) > gpu_bytes:
            logger.warning(
                "About %.1f GiB are needed on each GPU while %s, and it has %.1f GiB: %s",
                estimate.need(phase) / GIB, PHASES[phase], gpu_bytes / GIB, advice,
            )  # fmt: skip
    if sum(estimate.host.values()) > host_bytes:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in estimate.host.items())
        logger.warning(
            "About %.1f GiB of host memory are needed on each machine, which has %.1f GiB (%s): offload less, "
            "leave trainer.async_save off, or spread the run over more machines",
            sum(estimate.host.values()) / GIB, host_bytes / GIB, parts,
        )  # fmt: skip
    return estimate


def estimate_memory(run: RunSettings, actor: ModelShape, critic: ModelShape | None, gpu_bytes: float) -> MemoryEstimate:
    """The parts of each phase. vLLM's share is a fraction of `gpu_bytes`."""
    policy_settings = run.actor_rollout_ref
    resting = _resting(run, actor, critic)
    engine = _engine(run, actor, gpu_bytes) if run.generates else {}
    always = {"CUDA and its libraries": float(OVERHEAD_BYTES)}
    beside = {} if policy_settings.rollout.name == "vllm" and policy_settings.rollout.free_cache_engine else engine
    phases: dict[Phase, Sizes] = {"generate": {**resting, **engine, **always}} if run.generates else {}
    phases["update_actor"] = {**resting, **_actor_update(run, actor), **beside, **always}
    if critic is not None:
        base = {"actor's weights": _weights("actor", run, actor) / run.ranks} if run.share_base else {}
        phases["update_critic"] = {**resting, **base, **_critic_update(run, critic), **beside, **always}
    return MemoryEstimate(phases, _host(run, actor, critic))


def layer_bytes_per_token(shape: ModelShape, dtype: str, compiled: bool) -> int:
    """Bytes per token that a pre-norm decoder layer keeps for its backward pass: the inputs of its products and norms.

    With hidden size D, intermediate size F, queries Q and keys K (all heads), b bytes per number:

        norms       2 x (4 + 2 b) D      an fp32 copy of the input, normalised, scaled; compiled: 2 x 2 b D
        attention   b (2 Q + 2 K) + 4 H  q, output, k, v, and log-sums in fp32
        head norms  (4 + b) (Q + K)      only where there are some; compiled: b (Q + K)
        MLP         4 b F                gate, its activation, up, their product; compiled: 3 b F

    Against the peaks of a Qwen2.5-1.5B, 16,384 tokens, on an H200: compiling takes off 12.9 GiB here and took off
    12.9 there; computing every layer again takes off 41.3 here and took off 45.0 there, with keys repeated per head.
    """
    b = _itemsize(dtype)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (2 * b if compiled else 4 + 2 * b) * shape.width
    attention = b * (2 * queries + 2 * keys) + 4 * shape.heads
    head_norms = (b if compiled else 4 + b) * (queries + keys) if shape.normed_heads else 0
    return norms + attention + head_norms + (3 if compiled else 4) * b * shape.intermediate


def _resting(run: RunSettings, actor: ModelShape, critic: ModelShape | None) -> Sizes:
    """Models and states that stay on the GPU while others work."""
    policy_settings, parts = run.actor_rollout_ref, {}
    for name, shape, fsdp in _trained(run, actor, critic):
        if not fsdp.param_offload:
            parts[f"{name}'s weights"] = _weights(name, run, shape) / run.ranks
        if not fsdp.optimizer_offload:
            parts[f"{name}'s optimizer states"] = MOMENTS * shape.trained / run.ranks
    if run.use_reference and not actor.frozen and not policy_settings.ref.fsdp_config.param_offload:
        parts["reference's weights"] = _reference(run, actor)
    return parts


def _trained(
    run: RunSettings, actor: ModelShape, critic: ModelShape | None
) -> list[tuple[str, ModelShape, FSDPConfig]]:
    trained = [("actor", actor, run.actor_rollout_ref.actor.fsdp_config)]
    if critic is not None:
        trained.append(("critic", critic, run.critic.model.fsdp_config))
    return trained


def _weights(name: str, run: RunSettings, shape: ModelShape) -> float:
    """Bytes on all ranks together."""
    fsdp = run.actor_rollout_ref.actor.fsdp_config if name == "actor" else run.critic.model.fsdp_config
    if name == "critic" and run.share_base:
        return MASTER * shape.trained
    frozen = _itemsize(fsdp.dtype) * (shape.frozen - shape.packed)
    return MASTER * shape.trained + frozen + run.ranks * BITS_PER_WEIGHT / 8 * shape.packed


def _reference(run: RunSettings, actor: ModelShape) -> float:
    return _itemsize(run.actor_rollout_ref.ref.fsdp_config.dtype) * actor.parameters / run.ranks


def _engine(run: RunSettings, actor: ModelShape, gpu_bytes: float) -> Sizes:
    rollout = run.actor_rollout_ref.rollout
    if rollout.name == "vllm":
        return {"vLLM": rollout.gpu_memory_utilization * gpu_bytes}
    b = _itemsize(rollout.dtype)
    longest = rollout.prompt_length + rollout.response_length
    per_token = 2 * actor.layers * actor.kv_heads * actor.head_dim * b
    return {"rollout's weights": b * actor.parameters, "KV cache": rollout.max_num_seqs * longest * per_token}


def _actor_update(run: RunSettings, shape: ModelShape) -> Sizes:
    policy_settings = run.actor_rollout_ref
    actor, rollout = policy_settings.actor, policy_settings.rollout
    shards = actor.ulysses_sequence_parallel_size
    tokens, several, sharing = _actor_micro_batch(run)
    parts = _update("actor", run, shape, actor.fsdp_config, policy_settings.model, tokens, several, shards)
    # Only answers have logits. What is kept of them beyond a chunk is kept where there is room.
    answered = tokens / shards * sharing * rollout.response_length / _tokens(rollout, sharing, sharing)
    parts["logits"] = min(CHUNK_BYTES, answered * shape.vocabulary * _itemsize(actor.fsdp_config.dtype))
    return parts


def _critic_update(run: RunSettings, shape: ModelShape) -> Sizes:
    critic = run.critic
    tokens, several = _critic_micro_batch(run)
    shards = critic.ulysses_sequence_parallel_size
    return _update("critic", run, shape, critic.model.fsdp_config, critic.model, tokens, several, shards)


def micro_batch_tokens(run: RunSettings, phase: Phase) -> int:
    """Tokens of the largest micro-batch of the actor's update, or of the critic's."""
    return _actor_micro_batch(run)[0] if phase == "update_actor" else _critic_micro_batch(run)[0]


def _actor_micro_batch(run: RunSettings) -> tuple[int, bool, int]:
    """As `_largest_micro_batch`, and how many rows have a prompt between them."""
    policy_settings = run.actor_rollout_ref
    actor, rollout = policy_settings.actor, policy_settings.rollout
    prompts = max(1, actor.ppo_mini_batch_size * actor.ulysses_sequence_parallel_size // run.ranks)
    answers = 2 if run.pairs else 1 if actor.use_sft_mode else rollout.n
    sharing = answers if policy_settings.model.use_remove_padding else 1
    together = answers if run.pairs else 1
    return *_largest_micro_batch(actor, rollout, prompts * answers, sharing, together), sharing


def _critic_micro_batch(run: RunSettings) -> tuple[int, bool]:
    """As `_largest_micro_batch`."""
    critic, rollout = run.critic, run.actor_rollout_ref.rollout
    prompts = max(1, critic.ppo_mini_batch_size * critic.ulysses_sequence_parallel_size // run.ranks)
    members = rollout.n + 1
    sharing = members if critic.model.use_remove_padding else 1
    return _largest_micro_batch(critic, rollout, prompts * members, sharing, together=members)


def _largest_micro_batch(
    part: ActorConfig | CriticConfig, rollout: RolloutConfig, rows: int, sharing: int, together: int
) -> tuple[int, bool]:
    """Tokens of the largest micro-batch, if everything is as long as it may be, and whether there are several.

    Of the `rows`, every `sharing` have one prompt between them; every `together` are never split.
    """
    everything = _tokens(rollout, rows, sharing)
    smallest = _tokens(rollout, together, sharing)
    if part.use_dynamic_bsz:
        limit = max(part.ppo_max_token_len_per_gpu * part.ulysses_sequence_parallel_size, smallest)
    else:
        limit = max(_tokens(rollout, part.ppo_micro_batch_size_per_gpu, sharing), smallest)
    return min(everything, limit), everything > limit


def _tokens(rollout: RolloutConfig, rows: int, sharing: int) -> int:
    """The most tokens that so many rows at their longest can have: cuts may fall between the rows of one prompt."""
    prompts = (sharing - gcd(rows, sharing) + rows - 1) // sharing + 1
    return prompts * rollout.prompt_length + rows * rollout.response_length


def _update(
    name: str, run: RunSettings, shape: ModelShape, fsdp: FSDPConfig, model: ModelConfig, tokens: int, several: bool,
    shards: int,
) -> Sizes:  # fmt: skip
    """The memory that an update adds to what rests on the GPU, with weights and states that came from the host; the
    largest micro-batch's `tokens` are shared by so many ranks."""
    own = ceil(tokens / shards)
    parts = {
        f"{name}'s weights": _weights(name, run, shape) / run.ranks,
        f"{name}'s optimizer states": MOMENTS * shape.trained / run.ranks,
        # With several micro-batches every rank sums its own, whole, and shares them out layer by layer at the end.
        f"{name}'s gradients": GRADIENT * shape.trained / (1 if several and fsdp.sync_gradients_once else run.ranks),
        "gathered layers": _gathered(shape, fsdp),
        f"activations of {own} tokens": own * _activations(shape, fsdp, model),
    }
    if shape.capped_scores and model.use_remove_padding:
        rollout = run.actor_rollout_ref.rollout
        longest = rollout.prompt_length + rollout.response_length
        parts["capped scores of one row"] = float(COPIES * 4 * (shape.heads // shards) * longest**2)
    return parts


def _gathered(shape: ModelShape, fsdp: FSDPConfig) -> float:
    """Gathered weights in compute type: two layers (one at work, one on its way) and what is outside the layers, or
    everything without reshard_after_forward. Their gradients: of what is outside the layers and of one layer, the
    latter once more in fp32; with adapters, of one layer's alone. A model of few parameters is gathered as one layer.
    Weights in 4 bits are not gathered: of them, one layer's at most are there as they are computed with."""
    b, layers = _itemsize(fsdp.dtype), shape.layers
    at_once = layers if shape.parameters - shape.packed < fsdp.wrap_policy.min_num_params else 1
    whole = b * shape.layer_parameters
    packed = b * shape.packed / max(1, layers)
    outside = b * (shape.parameters - layers * shape.layer_parameters)
    weights = outside + (2 if fsdp.reshard_after_forward and at_once == 1 else layers) * (whole - packed)
    if shape.frozen:
        return weights + packed + (b + GRADIENT) * at_once * shape.trained / max(1, layers)
    return weights + outside + at_once * (whole + GRADIENT * shape.layer_parameters)


def _activations(shape: ModelShape, fsdp: FSDPConfig, model: ModelConfig) -> float:
    """Bytes per token: a recomputed layer keeps its input only, and one such layer at a time is there in full."""
    whole = layer_bytes_per_token(shape, fsdp.dtype, fsdp.use_torch_compile)
    recomputed = ceil(shape.layers * model.recompute_share) if model.enable_gradient_checkpointing else 0
    kept = shape.layers - recomputed + (1 if recomputed else 0)
    return kept * whole + recomputed * _itemsize(fsdp.dtype) * shape.width


def _host(run: RunSettings, actor: ModelShape, critic: ModelShape | None) -> Sizes:
    """Bytes in one machine's memory: what all of its ranks put there, and a whole model as it is read at the start."""
    here, parts = run.ranks_per_machine / run.ranks, {}
    for name, shape, fsdp in _trained(run, actor, critic):
        if fsdp.param_offload:
            parts[f"{name}'s weights"] = _weights(name, run, shape) * here
        if fsdp.optimizer_offload:
            parts[f"{name}'s optimizer states"] = MOMENTS * shape.trained * here
        if run.async_save:
            parts[f"copy of the {name} for checkpoints"] = (MASTER + MOMENTS) * shape.trained * here
    if run.use_reference and not actor.frozen and run.actor_rollout_ref.ref.fsdp_config.param_offload:
        parts["reference's weights"] = _reference(run, actor) * run.ranks_per_machine
    parts["reading a model"] = MASTER * max(shape.parameters for _, shape, _ in _trained(run, actor, critic))
    return parts


def _savings(run: RunSettings, actor: ModelShape, critic: ModelShape | None, gpu_bytes: float, phase: Phase) -> str:
    """The settings that would reduce the phase's memory, each by itself, the largest saving first."""

    def need(changed: RunSettings) -> float:
        return estimate_memory(changed, actor, critic, gpu_bytes).need(phase)

    savings = []
    for knob in knobs(phase, run.actor_rollout_ref, run.critic):
        savings.append((need(run) - need(turned(run, knob)), str(knob)))
    doubled = replace(run, ranks=2 * run.ranks)
    savings.append((need(run) - need(doubled), f"twice as many GPUs (now {run.ranks})"))
    useful = sorted((s for s in savings if s[0] > 0.05 * GIB), reverse=True)
    return ", ".join(f"{text} saves {saved / GIB:.1f} GiB" for saved, text in useful)


def turned(run: RunSettings, knob: Knob) -> RunSettings:
    """The run with a setting at its better value."""
    return _with_value(run, knob.key.split("."), knob.better)


def _with_value(settings: Any, path: list[str], value: Any) -> Any:
    """A copy of nested settings with one value replaced."""
    if len(path) > 1:
        value = _with_value(getattr(settings, path[0]), path[1:], value)
    return replace(settings, **{path[0]: value})


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
