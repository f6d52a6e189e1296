"""Child of test_tensor_parallel: one engine over two ranks that hold different prompts."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.vllm.tiny_engine import GREEDY, prompts, sampled, start_engine, tiny_model

LENGTHS = [[3, 150, 1], [9, 200]]


def run(rank: int, world_size: int, folder: Path) -> None:
    """One rank: greedy and sampled answers to its own prompts, written to `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timeout
    )
    engine = start_engine(tensor_model_parallel_size=2)
    engine.push_weights(tiny_model().named_parameters())
    data = prompts(LENGTHS[rank])
    answers = {
        "greedy": engine.generate(data, GREEDY, seed=0),
        # Ranks that share an engine may bring different seeds: the first one's counts.
        "first": engine.generate(data, sampled(3), seed=5 + rank, report_log_probs=1),
        "again": engine.generate(data, sampled(3), seed=5, report_log_probs=1),
    }
    torch.save({name: dict(answered.batch) for name, answered in answers.items()}, folder / f"{rank}.pt")
