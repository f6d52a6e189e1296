"""Roles of worker processes, and which processes a run asks Ray for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

from verl.config.run import Config
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool
from verl.utils.named import call


class Role(Enum):
    """What a group of workers does; the policy's processes hold the frozen reference and generate, unless engines have
    processes of their own."""

    ActorRollout = "actor_rollout"
    Critic = "critic"
    Rollout = "rollout"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ResourcePoolManager:
    """Which processes there are (`resource_pool_spec`: pool name -> processes per node) and which role gets which.

    Pools are reserved as one and stand beside each other on the same nodes.
    """

    resource_pool_spec: dict[str, list[int]]
    mapping: dict[Role, str]
    use_gpu: bool = False
    begun: dict[str, RayResourcePool] = field(default_factory=dict, repr=False)

    def begin(self, prepare: Callable[[Sequence[Role]], Callable[[], None]]) -> None:
        """Start the processes, which do what `prepare` says for their roles until a worker group takes them; ValueError
        as below."""
        self.begun.update(self.create_resource_pool())
        for name, pool in self.begun.items():
            roles = self.roles_in(name)
            pool.begin([str(role) for role in roles], prepare(roles))

    def release(self) -> None:
        """Give back what `begin` has started."""
        for pool in self.begun.values():
            pool.release()
        self.begun.clear()

    def roles_in(self, pool: str) -> list[Role]:
        """The roles whose processes are those of the pool."""
        return [role for role, name in self.mapping.items() if name == pool]

    def create_resource_pool(self) -> dict[str, RayResourcePool]:
        """The pools by name, those that have begun if any; ValueError at once if the cluster cannot hold them."""
        if self.begun:
            return dict(self.begun)
        *first, last = self.resource_pool_spec
        on_nodes = [sum(counts) for counts in zip(*self.resource_pool_spec.values(), strict=True)]
        rest, pools = RayResourcePool(on_nodes, use_gpu=self.use_gpu, name_prefix=last), {}
        rest.get_placement_groups()
        for name in first:
            pools[name], rest = rest.split(self.resource_pool_spec[name])
        return pools | {last: rest}

    # ---- names of verl's that nothing here calls ----

    def get_n_gpus(self) -> int:
        """Processes of all pools; on GPU nodes each has a GPU."""
        return sum(sum(processes) for processes in self.resource_pool_spec.values())


def resource_pools(config: Config) -> ResourcePoolManager:
    """The processes that train and, where engines have devices of their own, theirs."""
    trainer = config.trainer
    processes = {"global_pool": [trainer.n_gpus_per_node] * trainer.nnodes}
    roles = dict.fromkeys([Role.ActorRollout] + ([Role.Critic] if config.use_critic else []), "global_pool")
    if config.rollout_ranks:
        processes["rollout_pool"] = [config.actor_rollout_ref.rollout.n_gpus_per_node] * trainer.nnodes
        roles[Role.Rollout] = "rollout_pool"
    return ResourcePoolManager(processes, roles, use_gpu=trainer.device != "cpu")


def preparing(config: Config, classes: Sequence[type | str], engine: bool) -> partial[None]:
    """A function to call in the processes of a run's ranks, before they are told their part (`beforehand.prepare`).

    Args:
        classes: of the workers, or their names ("module:Class").
        engine: whether they have one.
    """
    policy, critic = config.actor_rollout_ref, config.critic
    models = [policy.model] + ([critic.model] if config.use_critic else [])
    # A copy in shared memory is made and read by whoever loads the model.
    paths = [model.path for model in models if not model.use_shm]
    # By name: it takes torch.
    return partial(
        call, "verl.workers.beforehand:prepare", tuple(classes), paths, policy.rollout.name if engine else None
    )


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
            use_engine=config.generates and not config.rollout_ranks,
            total_steps=max(1, total_steps - config.frozen_actor_steps),
            **common,
        )
    }
    if config.use_critic:
        roles[str(Role.Critic)] = RayClassWithInitArgs(
            classes[Role.Critic], config.critic, total_steps=total_steps, eos_token_ids=critic_eos_token_ids, **common
        )
    if config.rollout_ranks:
        # Nobody else wants its memory.
        rollout = replace(config.actor_rollout_ref.rollout, free_cache_engine=False)
        roles[str(Role.Rollout)] = RayClassWithInitArgs(
            classes[Role.Rollout], replace(config.actor_rollout_ref, rollout=rollout), **common
        )
    return roles
