"""Settings of the discriminator that contradict each other or the rest: its head start, loss and replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

from omegaconf import OmegaConf

from verl.config import DiscriminatorConfig
from verl.config.critic import past_groups
from verl.config.run import Config
from verl.config.shipped import DISCRIMINATOR_LOSSES
from verl.trainer.config.overrides import CONFIG_DIR
from verl.utils.user_code import cannot_end_the_run, is_user_function


def discriminator_conflicts(config: Config) -> Iterator[str]:
    """Everything wrong with them, as sentences."""
    for check in (_critic_warmup, _loss, _replay):
        yield from check(config)


def _critic_warmup(config: Config) -> Iterator[str]:
    trainer, critic = config.trainer, config.critic
    auto = trainer.critic_warmup == "auto"
    if not auto and trainer.critic_warmup < -1:
        yield f"trainer.critic_warmup={trainer.critic_warmup}: use -1 (no discriminator), 0, a number of steps, or auto"
    if auto and (config.data.val_files is None or critic.held_out_prompts == 0):
        yield (
            "trainer.critic_warmup=auto looks at held-out pairs, and there are none: set data.val_files and "
            "critic.held_out_prompts, or give trainer.critic_warmup a number of steps"
        )
    if auto and trainer.warmup_use_sft:
        yield "trainer.critic_warmup=auto freezes the actor, and trainer.warmup_use_sft=True trains it: choose one"
    start = critic.head_start
    if auto and start.max_steps < start.checks * start.check_every:
        yield (
            f"critic.head_start.max_steps={start.max_steps} ends before {start.checks} checks every "
            f"{start.check_every} steps are made: raise it to {start.checks * start.check_every} or more"
        )
    if auto and critic.balance.enable and start.accuracy >= critic.balance.highest:
        yield (
            f"critic.head_start.accuracy={start.accuracy} is not below critic.balance.highest="
            f"{critic.balance.highest}, above which the discriminator is not trained: it might never get there"
        )
    if critic.balance.lowest >= critic.balance.highest:
        yield (
            f"critic.balance.lowest={critic.balance.lowest} must be below critic.balance.highest="
            f"{critic.balance.highest}: between them is where the discriminator is left alone"
        )


def _loss(config: Config) -> Iterator[str]:
    """A discriminator loss that cannot be loaded, or is none: a user's may do anything."""
    settings, fn = config.critic.discriminator, None
    if not config.use_critic:
        return
    adaptive = settings.adaptive_temperature
    if adaptive.enable or not _is_as_shipped(settings):
        from verl.trainer.ppo.discriminator_algos import get_discriminator_loss_fn

        try:
            fn = get_discriminator_loss_fn(settings.loss).fn
        except ValueError as error:
            yield f"critic.discriminator.loss: {error}"
            return
    if adaptive.enable and "temperature" not in signature(fn).parameters:
        yield (
            f"critic.discriminator.adaptive_temperature.enable=True: the loss {settings.loss} has no temperature; "
            "choose another loss or leave it off"
        )
    if adaptive.lowest > adaptive.highest:
        yield (
            f"critic.discriminator.adaptive_temperature.lowest={adaptive.lowest} is above highest={adaptive.highest}"
        )
    if settings.custom and not is_user_function(settings.loss):
        yield f"critic.discriminator.custom is for a loss from a file of your own, not for {settings.loss}"
    problem = None if fn is None else _loss_problem(fn, settings.constants())
    if problem is not None:
        yield f"critic.discriminator.loss={settings.loss}, tried on two groups of three answers: {problem}"


def _is_as_shipped(settings: DiscriminatorConfig) -> bool:
    """Whether loss and constants are this package's own, which need no trial; one takes torch."""
    if settings.loss not in DISCRIMINATOR_LOSSES:
        return False
    shipped = OmegaConf.load(CONFIG_DIR / "critic" / "dp_critic.yaml")
    return settings.constants() == shipped.discriminator[settings.loss]


def _loss_problem(fn: Callable, constants: dict[str, Any]) -> str | None:
    """The reason why a function is no discriminator loss, or None."""
    import torch

    from verl.trainer.ppo.discriminator_algos import PairScores, loss_problem

    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, n, generator=generator, requires_grad=True) for n in (3, 1, 3, 1)]
    try:
        with cannot_end_the_run("it"):
            made = fn(PairScores(*sides), **constants)
            problem = loss_problem(made, PairScores(*sides))
            if problem is not None:
                return problem
            parts = [fn(PairScores(*(side[i : i + 1] for side in sides)), **constants)[0] for i in (0, 1)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not torch.allclose(made[0], sum(parts) / 2, atol=1e-5):
        return "it is not a mean over pairs: the mean of the two groups' losses differs from the loss of both"
    return None


def _replay(config: Config) -> Iterator[str]:
    critic, n = config.critic, config.actor_rollout_ref.rollout.n
    if not config.use_critic or critic.replay.capacity == 0:
        return
    if config.trainer.ranks % critic.ulysses_sequence_parallel_size:
        return  # `_sequence_parallel` says so.
    past = past_groups(critic.ppo_mini_batch_size, critic.replay.fraction, config.critic_shares)
    if past == 0:
        yield (
            f"critic.replay.fraction={critic.replay.fraction} of mini-batches of {critic.ppo_mini_batch_size} prompts "
            f"is no whole group on each of {config.critic_shares} ranks: raise it, or set critic.replay.capacity=0"
        )
    needed = past * (config.data.train_batch_size // critic.ppo_mini_batch_size) * n
    if critic.replay.capacity < needed:
        yield (
            f"critic.replay.capacity={critic.replay.capacity} answers is less than the {needed} past answers that one "
            f"step draws (critic.replay.fraction={critic.replay.fraction}): raise it to several times that"
        )
