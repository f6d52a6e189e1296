"""Which stage a command line that names none looks like.

Without `stage=` GAD is meant, and scripts from elsewhere name none: one that is written for SFT must not start a
discriminator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from verl.config.run import Config

SFT_NAME = re.compile(r"(?<![a-z])(seqkd|sft)(?![a-z])", re.IGNORECASE)
# Who sets one of these has a discriminator in mind.
OF_A_DISCRIMINATOR = re.compile(
    r"critic\.(model\.path|discriminator\.|replay\.|balance\.|head_start\.|held_out_prompts)"
)


def stage_conflicts(config: Config, overrides: Sequence[str]) -> Iterator[str]:
    """A sentence if no stage is named, the settings say SFT, and a discriminator would be trained.

    Args:
        overrides: what the command line sets, `KEY=VALUE` each, with or without plus signs.
    """
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    # SFT that is asked for by name beside a discriminator is refused anyway, or meant (`trainer.warmup_use_sft`).
    if "stage" in given or not config.use_critic or config.use_sft:
        return
    if config.trainer.critic_warmup == "auto" or any(map(OF_A_DISCRIMINATOR.match, given)):
        return
    signs = list(_signs_of_sft(config, given))
    # One sign is enough where nothing else keeps the discriminator from starting (`check_models` asks for a warmed-up
    # one at critic_warmup=0).
    if len(signs) >= 2 or (signs and config.frozen_actor_steps > 0):
        yield (
            f"no stage= is given, and the settings look like SFT ({', '.join(signs)}, no critic.model.path): write "
            "stage=seqkd for that; or stage=warmup or stage=gad, which is what a command without one means, to train a "
            "discriminator"
        )


def _signs_of_sft(config: Config, given: dict[str, str]) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    for name, value, of_sft in (
        ("use_kl_loss", actor.use_kl_loss, False),
        ("kl_loss_coef", actor.kl_loss_coef, 0),
    ):
        if f"actor_rollout_ref.actor.{name}" in given and value == of_sft:
            yield f"actor_rollout_ref.actor.{name}={value}"
    for name in ("experiment_name", "project_name"):
        value = getattr(config.trainer, name)
        if SFT_NAME.search(value):
            yield f"trainer.{name}={value}"
