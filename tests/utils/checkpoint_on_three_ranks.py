"""Child of test_whole_folders: an actor's and a critic's folder, as three ranks write them."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.ranks import leave
from tests.tiny import byte_tokenizer, causal_lm, scorer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager


def run(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=2)
    )
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for name, model in (("actor", causal_lm(seed=5)), ("critic", scorer(seed=6))):
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        manager = FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32)
        manager.save_checkpoint(folder / "global_step_3.tmp" / name)
    leave()
