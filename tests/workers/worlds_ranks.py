"""Child of test_worlds: what one number of ranks saved, resumed by every other number of ranks, over gloo.

Run as a program, it forks its ranks: what takes longest by far is to import torch, and once is enough.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification

from tests.ranks import leave
from tests.tiny import byte_tokenizer
from tests.workers.updates_setup import EOS, batch, settings
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.sharding import shard
from verl.protocol import DataProto
from verl.trainer.config import Config
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from verl.workers.updates import build_optimizer

WORLDS = (1, 2, 4, 8)
STEPS = 2
PROMPTS = 8
# 8 divides none of these but the number of prompts; a key has 6 rows, a norm of its heads 6 entries, the score 1 row.
UNEVEN = {
    "vocab_size": 261,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": EOS,
}
OPTIM = ("lr=1e-3", "lr_warmup_steps=2", "lr_scheduler_type=cosine", "weight_decay=0.1")


def config() -> Config:
    """GAD with the whole batch as a mini-batch, weights that do change, and a learning rate that every step changes."""
    changes = [f"{name}.optim.{entry}" for name in ("actor_rollout_ref.actor", "critic") for entry in OPTIM]
    clips = ["actor_rollout_ref.actor.grad_clip=1", "critic.grad_clip=1"]
    # A loss on differences alone leaves the head's bias a gradient of rounding errors, which Adam makes steps of.
    loss = "critic.discriminator.loss=ranking"
    return settings("gspo", overrides=[f"data.train_batch_size={PROMPTS}", loss, *changes, *clips])


@dataclass
class Job:
    """Student and discriminator on so many ranks."""

    world: int
    rank: int

    def __post_init__(self) -> None:
        self.config = config()
        torch.manual_seed(0)
        student = Qwen3ForCausalLM(Qwen3Config(**UNEVEN, tie_word_embeddings=True))
        labels = Qwen3Config(**UNEVEN, num_labels=1, classifier_dropout=0.0)
        group, critic = self.config.actor_rollout_ref, self.config.critic
        self.modules = {"actor": PolicyModel(student), "critic": ScoreModel(Qwen3ForTokenClassification(labels))}
        self.optimizers, self.managers = {}, {}
        for name, optim in (("actor", group.actor.optim), ("critic", critic.optim)):
            module = self.modules[name]
            shard(module, group.actor.fsdp_config, "cpu")
            optimizer, schedule = build_optimizer(module, optim, total_steps=10)
            self.optimizers[name] = optimizer
            self.managers[name] = FSDPCheckpointManager(
                module.hf, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32
            )
        self.actor = DataParallelPPOActor(group.actor, group.rollout, self.modules["actor"], self.optimizers["actor"])
        self.critic = DataParallelPPOCritic(critic, self.modules["critic"], self.optimizers["critic"], EOS)

    def step(self) -> dict[str, float]:
        """One training step on this rank's share of the batch."""
        share = PROMPTS // self.world
        data = DataProto.concat([batch(), batch()])[share * self.rank : share * (self.rank + 1)]
        data.batch.pop("old_log_probs")
        data.meta_info["mini_batches"] = 1
        metrics = self.actor.update_policy(data) | self.critic.update_critic(data)
        for name, manager in self.managers.items():
            metrics[f"{name}/lr"] = manager.lr_scheduler.get_last_lr()[0]
            manager.lr_scheduler.step()
        return metrics

    def save(self, folder: Path) -> None:
        for name, manager in self.managers.items():
            manager.save_checkpoint(folder / name)

    def load(self, folder: Path) -> None:
        for name, manager in self.managers.items():
            manager.load_checkpoint(folder / name)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole."""
        return {
            f"{name}.{key}": whole(tensor)
            for name, module in self.modules.items()
            for key, tensor in module.hf.state_dict().items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """All weights, and AdamW's tensors by the names of their parameters, whole."""
        found = self.weights()
        for name, module in self.modules.items():
            states = get_optimizer_state_dict(module.hf, self.optimizers[name])["state"]
            found |= {
                f"{name}.optim.{key}.{kind}": whole(tensor)
                for key, state in states.items()
                for kind, tensor in state.items()
            }
        return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def in_worlds(rank: int, folder: Path, stage: str):
    """This rank's jobs in all worlds that it belongs to, one after the other."""
    for world in WORLDS:
        if rank >= world:
            continue
        meeting = f"file://{folder}/{stage}-{world}.rendezvous"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        yield Job(world, rank)
        dist.barrier()
        dist.destroy_process_group()


def keep(job: Job, file: Path, *content) -> None:
    if job.rank == 0:
        torch.save(content, file)


def run(rank: int, folder: Path) -> None:
    """Every world trains, saves after STEPS and goes on by one; then every world resumes what each has saved."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for job in in_worlds(rank, folder, "saving"):
        for _ in range(STEPS):
            job.step()
        job.save(folder / f"of_{job.world}")
        saved = job.state()
        metrics = job.step()
        keep(job, folder / f"undisturbed_{job.world}.pt", saved, metrics, job.weights())
    dist.init_process_group("gloo", init_method=f"file://{folder}/all", rank=rank, world_size=max(WORLDS))
    dist.barrier()
    dist.destroy_process_group()
    for job in in_worlds(rank, folder, "resuming"):
        for saved_by in WORLDS:
            job.load(folder / f"of_{saved_by}")
            loaded = job.state()
            if saved_by == 1:
                job.save(folder / f"of_1_by_{job.world}")
            metrics = job.step()
            keep(job, folder / f"of_{saved_by}_on_{job.world}.pt", loaded, metrics, job.weights())
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=rank, world_size=max(WORLDS))
    leave()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run, args=(Path(sys.argv[1]),), nprocs=max(WORLDS), start_method="fork")
