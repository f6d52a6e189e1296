"""A run on one rank without Ray: everything in this process, for experiments and for stepping through with a debugger.

    from verl.trainer.config import compose_config
    run_in_process(compose_config(["stage=gad", ...]))

The loop, the workers and the results are those of `main_ppo`.
"""

from __future__ import annotations

from typing import ClassVar

from verl.single_controller.base import ClassWithInitArgs, WorkerGroup
from verl.single_controller.base.worker import colocate
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import Config
from verl.trainer.main_ppo import TaskRunner
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import ResourcePoolManager


class InProcessTrainer(RayPPOTrainer):
    """The trainer with its workers beside it."""

    def spawn(self, roles: dict[str, ClassWithInitArgs]) -> dict[str, WorkerGroup]:
        groups = {name: LocalWorkerGroup(role) for name, role in roles.items()}
        colocate({name: group.worker for name, group in groups.items()})
        return groups


class InProcessRunner(TaskRunner):
    """A `TaskRunner` that starts no Ray."""

    trainer_class: ClassVar[type[RayPPOTrainer]] = InProcessTrainer

    def begin(self, config: Config, pools: ResourcePoolManager) -> None:
        """There is nothing to start but what a subclass has."""
        self.start(config)

    def start(self, config: Config) -> None:
        """Nothing."""


def run_in_process(config: Config) -> None:
    """Train on one rank in this process.

    Raises:
        ValueError: the configuration asks for several ranks.
    """
    if config.trainer.ranks != 1:
        raise ValueError(f"one process is one rank, got trainer.nnodes x n_gpus_per_node = {config.trainer.ranks}")
    if config.rollout_ranks:
        raise ValueError(
            "one process has no other that writes answers ahead: set trainer.rollout_ahead=0 and "
            "actor_rollout_ref.rollout.n_gpus_per_node=0, or run with Ray"
        )
    InProcessRunner().run(config)
