"""Child of the tests of sequence parallelism: updates, log-probs and scores on ranks that share their tokens, gradients
gathered whole."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import leave
from tests.tiny import causal_lm, scorer
from tests.workers.updates_setup import EOS, PROMPTS, batch, settings, update
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.layers import compile_layers
from verl.models.sequence_parallel import own_shard
from verl.models.sharding import shard
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic

FSDP = "actor_rollout_ref.actor.fsdp_config"
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
COUNTED = {}


@register_policy_loss("counted")
def counted(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, **totals):
    """A user's policy loss that keeps the mini-batch's totals."""
    COUNTED.update(totals)
    return log_prob.sum(), {}


def run(
    rank: int, world_size: int, size: int, runs: list[tuple[str, str]], folder: Path, device: str = "cpu",
    dtype: str = "float32", compiled: bool = False,
) -> None:  # fmt: skip
    """One rank of those that share their tokens with `size` - 1 others: each of `runs`, a loss and how it is cut, once;
    rank 0 writes gradients and metrics to `folder`, and log-probs and scores of its rows."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        device, backend = f"cuda:{rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    share = PROMPTS // (world_size // size)
    mine = slice(rank // size * share, (rank // size + 1) * share)
    wrap = partial(shared, size=size, device=device, dtype=dtype, compiled=compiled)
    for loss, split in runs:
        module, metrics = update(loss, settings(loss, split, [f"{FSDP}.dtype={dtype}"]), batch()[mine], wrap)
        gradients = {name: parameter.grad.full_tensor().cpu() for name, parameter in module.named_parameters()}
        if rank == 0:
            torch.save({"gradients": gradients, "metrics": metrics}, folder / f"{loss}-{split}.pt")
    computed = log_probs_and_scores(batch()[mine], wrap)
    update("counted", settings("ppo", "whole", [f"{LOSS_MODE}=counted"]), batch()[mine], wrap)
    if rank == 0:
        torch.save(COUNTED, folder / "counted.pt")
        torch.save(computed, folder / "computed.pt")
    leave()


def shared(module, size: int, device: str, dtype: str, compiled: bool):
    module.shard = own_shard(size)
    if compiled:
        compile_layers(module.hf)
    shard(module, settings("sft", "whole", [f"{FSDP}.dtype={dtype}"]).actor_rollout_ref.actor.fsdp_config, device)
    return module


def log_probs_and_scores(data, wrap=lambda module: module) -> dict[str, torch.Tensor]:
    """What a step asks of actor, reference and discriminator before it updates them, rows cut by tokens."""
    config = settings("ranking", "tokens", ["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=20"])
    group = config.actor_rollout_ref
    actor = DataParallelPPOActor(group.actor, group.rollout, wrap(PolicyModel(causal_lm())))
    critic = DataParallelPPOCritic(config.critic, wrap(ScoreModel(scorer())), None, EOS)
    log_probs, entropies = actor.compute_log_prob(data)
    computed = {"log_probs": log_probs, "entropies": entropies, "values": critic.compute_values(data)}
    return {**computed, "teacher": actor.compute_teacher_log_prob(data), **critic.compute_scores(data)}
