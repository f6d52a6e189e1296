"""Roles of worker processes, and which processes a run asks Ray for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from verl.config.run import Config
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool


class Role(Enum):
    """What a group of workers does; the policy's processes also generate and hold the frozen reference."""

    ActorRollout = "actor_rollout"
    Critic = "critic"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ResourcePoolManager:
    """Which processes there are (`resource_pool_spec`: pool name -> processes per node) and which role gets which."""

    resource_pool_spec: dict[str, list[int]]
    mapping: dict[Role, str]
    use_gpu: bool = False
    begun: dict[str, RayResourcePool] = field(default_factory=dict, repr=False)

    def begin(self, prepare: Callable[[], None]) -> None:
        """Start the processes, which prepare themselves until a worker group takes them; ValueError as below."""
        self.begun.update(self.create_resource_pool())
        for name, pool in self.begun.items():
            pool.begin([str(role) for role, its in self.mapping.items() if its == name], prepare)

    def release(self) -> None:
        """Give back what `begin` has started."""
        for pool in self.begun.values():
            pool.release()
        self.begun.clear()

    def create_resource_pool(self) -> dict[str, RayResourcePool]:
        """The pools by name, those that have begun if any; ValueError at once if the cluster cannot hold them."""
        if self.begun:
            return dict(self.begun)
        pools = {
            name: RayResourcePool(processes, use_gpu=self.use_gpu, name_prefix=name)
            for name, processes in self.resource_pool_spec.items()
        }
        for pool in pools.values():
            pool.get_placement_groups()
        return pools

    # ---- names of verl's that nothing here calls ----

    def get_n_gpus(self) -> int:
        """Processes of all pools; on GPU nodes each has a GPU."""
        return sum(sum(processes) for processes in self.resource_pool_spec.values())


def worker_roles(
    config: Config, classes: Mapping[Role, type], total_steps: int, critic_eos_token_ids: tuple[int, ...]
) -> dict[str, RayClassWithInitArgs]:
    """Each role's worker class (`classes`) with what it is built with.

    Args:
        total_steps: of the run; the discriminator's schedule has so many, the actor's those in which it trains.
        critic_eos_token_ids: what may end an answer in the discriminator's tokens.
    """
    trainer = config.trainer
    common = {"device": trainer.device, "seed": config.data.seed, "collective_timeout": trainer.collective_timeout}
    roles = {
        str(Role.ActorRollout): RayClassWithInitArgs(
            classes[Role.ActorRollout],
            config.actor_rollout_ref,
            use_reference=config.use_reference,
            use_engine=config.generates,
            total_steps=max(1, total_steps - config.frozen_actor_steps),
            **common,
        )
    }
    if config.use_critic:
        roles[str(Role.Critic)] = RayClassWithInitArgs(
            classes[Role.Critic], config.critic, total_steps=total_steps, eos_token_ids=critic_eos_token_ids, **common
        )
    return roles
