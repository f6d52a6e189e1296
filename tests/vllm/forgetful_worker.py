"""A worker with a fault, for test_training_with_vllm; Ray's processes import it from here."""

from __future__ import annotations

from typing import ClassVar

from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.main_ppo import TaskRunner
from verl.trainer.ppo.roles import Role
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker


class ForgetfulWorker(ActorRolloutRefWorker):
    """Pushes weights once and never again."""

    pushed = False

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def push_weights(self) -> None:
        if not self.pushed:
            super().push_weights()
        self.pushed = True


class ForgetfulRunner(TaskRunner):
    """A run with such workers."""

    worker_classes: ClassVar[dict[Role, type]] = {Role.ActorRollout: ForgetfulWorker, Role.Critic: CriticWorker}
