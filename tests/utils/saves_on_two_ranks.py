"""Child of test_background_saves: what is written in the background while training goes on, on one rank or several."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.ranks import leave
from tests.tiny import byte_tokenizer, causal_lm
from verl.memory.offload import Offloader
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.checkpoint.sharded import Shard


def run(rank: int, ranks: int, folder: Path, offload: bool) -> None:
    """Save twice, in the foreground and in the background, where writing begins only after further steps."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=2)
    )
    model = causal_lm(seed=5)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    offloader = Offloader(model, optimizer, params=offload, optimizer_states=offload)
    manager = FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32)
    tokens = torch.arange(12).view(2, 6) + rank

    def train() -> None:
        with offloader.on_device(optimizer=True):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    may_write = threading.Event()
    write = Shard.write

    def write_late(shard: Shard, folder: Path) -> None:
        assert may_write.wait(60)
        write(shard, folder)

    train()
    offloader.rest()
    with offloader.on_device(optimizer=True):
        manager.reserve()
    for save in range(2):
        train()
        with offloader.on_device(optimizer=True):
            manager.save_checkpoint(folder / f"foreground{save}")
            may_write.clear()
            Shard.write = write_late
            manager.begin_checkpoint(folder / f"background{save}")
        train()
        train()
        assert not manager.is_written()
        may_write.set()
        while not manager.is_written():
            time.sleep(0.01)
        Shard.write = write
    if rank == 0:
        (folder / "done.json").write_text(json.dumps({"ranks": ranks}))
    leave()
