"""`python -m tests.vllm.dying_engine KEY=VALUE...`: a run on whose rank 1 the engine fails within its second
generation, in the way that WAY_OF_THE_TESTS names."""

from __future__ import annotations

import os
import signal
from typing import ClassVar

import torch

from verl.protocol import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer import main_ppo
from verl.trainer.main_ppo import TaskRunner
from verl.trainer.ppo.roles import Role
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker


def end(way: str) -> None:
    """What befalls the engine between two tokens."""
    if way == "memory":
        torch.empty(2**50)
    elif way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "error":
        raise AssertionError("block 7 is free\nand in use")


class DyingWorker(ActorRolloutRefWorker):
    """Ends in the model's forward pass, within the engine."""

    calls = 0

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        self.calls += 1
        if self.calls == 2 and self.rank == 1:
            way = os.environ["WAY_OF_THE_TESTS"]

            def befall(worker: object) -> None:
                worker.model_runner.execute_model = lambda *args, **kwargs: end(way)

            self.rollout.llm.collective_rpc(befall)
        return super().generate_sequences(prompts)


class DyingRunner(TaskRunner):
    """A run with such workers."""

    worker_classes: ClassVar[dict[Role, type]] = {Role.ActorRollout: DyingWorker, Role.Critic: CriticWorker}


if __name__ == "__main__":
    main_ppo.TaskRunner = DyingRunner
    main_ppo.main()
