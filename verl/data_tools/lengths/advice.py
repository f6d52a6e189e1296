"""Settings of a stage that fit measured lengths, as overrides that the trainer takes, with a reason for each.

Defaults are read from the trainer's own presets, and every line is composed and checked by the trainer's configuration
before it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.config.run import Config
from verl.data_tools.lengths.limits import Limits
from verl.data_tools.lengths.room import Machine, find_room
from verl.trainer.config import ConfigError, compose_config
from verl.trainer.config.loading import composed_preset
from verl.utils.command_line import called_as

# Optimizer steps below which a stage has hardly begun, in an epoch and in all, and epochs beyond which no preset goes.
STEPS_PER_EPOCH, STEPS, MOST_EPOCHS = 20, 40, 8
# Prompts below which gradients and the discriminator's accuracy are mostly noise.
SMALLEST_BATCH = 16
SCRIPTS = {
    "seqkd": "gpt5-8b-SeqKD-gspo.sh",
    "warmup": "gpt5-8b-warmup-gspo.sh",
    "gad": "gpt5-8b-gad-gspo.sh",
    "soda": "gpt5-8b-soda.sh",
}
NEEDS_CRITIC = ("warmup", "gad")


@dataclass
class Advice:
    """Of one stage: overrides in the order of the line, and what is to be said of each.

    settings: value by key. reasons: (key, reason), also of what is left as it is.
    """

    stage: str
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: list[tuple[str, str]] = field(default_factory=list)

    @property
    def line(self) -> str:
        """To be pasted behind the stage script."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def command(self) -> str:
        """The whole command, with names to be filled in."""
        critic = "--reward_model CRITIC " if self.stage in NEEDS_CRITIC else ""
        return f"bash scripts/train/{SCRIPTS[self.stage]} --model MODEL {critic}--exp_name NAME --nnodes 1 {self.line}"

    def say(self, key: str, reason: str, value: Any = None) -> None:
        """A reason, and the setting it is for unless that is left as it is; one that was set before is set anew."""
        if value is not None:
            self.settings[key] = value
            self.reasons = [said for said in self.reasons if said[0] != key]
        self.reasons.append((key, reason))


def advise(
    stage: str, limits: Limits, rows: int, keep: float, model: str, gpus: int, machine: Machine | None
) -> Advice:
    """Settings of a stage.

    Args:
        rows: that are trained on, those with prompts beyond the limit left out.
        gpus: ranks of the run, over which the batch has to divide.
        machine: what memory there is; None: nobody looks at memory.

    Raises:
        ValueError: too few rows for so many ranks, or the trainer would not take the settings.
    """
    advice = Advice(stage, 0)
    _add_limits(advice, limits, keep)
    _add_batch(advice, composed_preset(stage), rows, gpus)
    _add_budgets(advice, limits)
    if machine is None:
        compose(advice.settings, advice.stage, model, gpus, "cpu")
    else:
        _add_room(advice, model, gpus, machine)
    return advice


def _add_limits(advice: Advice, limits: Limits, keep: float) -> None:
    short = " (the model's context leaves no more)" if limits.by_context else ""
    dropped, cut = limits.too_long_prompts, limits.cut_answers
    if dropped:
        kept = f"keeps {1 - dropped:.2%} of the prompts (--keep {keep:g}){short}"
    else:
        kept = f"keeps every prompt whole{short}"
    advice.say("data.max_prompt_length", kept, limits.prompt)
    if dropped:
        advice.say(
            "data.filter_overlong_prompts",
            f"drops the other {dropped:.2%}: a prompt that is cut asks something else; data.truncation=left, right or "
            "middle would cut them instead, and the default, error, would refuse the run",
            True,
        )
    if cut:
        said = (
            f"keeps {1 - cut:.2%} of the answers whole{short}; the other {cut:.2%} lose their end and the EOS, and "
            "teach not to end: leave these rows out of the file if that matters"
        )
    else:
        said = f"keeps every answer whole, EOS included{short}"
    advice.say("data.max_response_length", said, limits.answer)
    advice.say(
        "actor_rollout_ref.rollout.max_model_len", "the two together, which the engine has to hold", limits.together
    )


def _add_batch(advice: Advice, preset: dict[str, Any], rows: int, gpus: int) -> None:
    usual, usual_epochs = preset["data"]["train_batch_size"], preset["trainer"]["total_epochs"]
    batch = usual
    while batch > max(gpus, SMALLEST_BATCH) and rows // batch < STEPS_PER_EPOCH:
        batch //= 2
    batch = max(gpus, batch // gpus * gpus)
    epochs = usual_epochs
    while rows * epochs // batch < STEPS and epochs < max(MOST_EPOCHS, usual_epochs):
        epochs += 1
    advice.steps = rows * epochs // batch
    if not advice.steps:
        raise ValueError(
            f"{rows} rows times {epochs} epochs do not fill one batch of {batch}, a prompt for each of {gpus} GPUs: "
            "pass fewer --gpus, or more data"
        )
    steps = f"{rows / batch:.1f} steps an epoch"
    if batch == usual:
        why = f"the preset's: {steps}"
    elif rows // usual >= STEPS_PER_EPOCH:
        why = f"the preset's {usual}, less what does not divide over {gpus} GPUs: {steps}"
    else:
        why = f"{steps}; with the preset's {usual} there would be {rows / usual:.1f}, too few to learn in"
    advice.say("data.train_batch_size", why, batch)
    total = f"{advice.steps} steps in all"
    why = f"the preset's: {total}" if epochs == usual_epochs else f"more than the preset's {usual_epochs}: {total}"
    if advice.steps < STEPS:
        why += f", which is little (below {STEPS}): more rows would help more than more epochs"
    warmup = preset["trainer"]["critic_warmup"]
    if isinstance(warmup, int) and advice.steps <= warmup:
        why += f"; trainer.critic_warmup={warmup} covers all of them, so the actor would not be trained"
    advice.say("trainer.total_epochs", why, epochs)


def _add_budgets(advice: Advice, limits: Limits) -> None:
    """A micro-batch holds one whole row at least."""
    preset = composed_preset(advice.stage)
    budgets = [("actor_rollout_ref.actor", preset["actor_rollout_ref"]["actor"])]
    if advice.stage in NEEDS_CRITIC:
        budgets.append(("critic", preset["critic"]))
    for name, part in budgets:
        now = part["ppo_max_token_len_per_gpu"]
        if now < limits.together:
            key = f"{name}.ppo_max_token_len_per_gpu"
            advice.say(
                key, f"a micro-batch holds one row of {limits.together} tokens at least, not {now}", limits.together
            )


def _add_room(advice: Advice, model: str, gpus: int, machine: Machine) -> None:
    room = find_room(lambda more: compose({**advice.settings, **more}, advice.stage, model, gpus, "cuda"), machine)
    for key, reason in room.reasons:
        advice.say(key, reason, room.changes[key])
    advice.say("memory", room.sentence(machine.gpu_bytes))


def compose(settings: Mapping[str, Any], stage: str, model: str, gpus: int, device: str) -> Config:
    """What the trainer makes of the settings of a line.

    Raises:
        ValueError: it would not take them; says why.
    """
    given = [f"{key}={value}" for key, value in settings.items()]
    try:
        return compose_config([
            f"stage={stage}", "data.train_files=train.parquet", "data.val_files=test.parquet",
            f"actor_rollout_ref.model.path={model}", "trainer.experiment_name=lengths",
            f"trainer.n_gpus_per_node={gpus}", f"trainer.device={device}", *given,
        ])  # fmt: skip
    except ConfigError as error:
        raise ValueError(f"the trainer does not take {' '.join(given)}: {error}") from error


def in_one_command(advices: Sequence[Advice]) -> str | None:
    """The stages as a pipeline, settings that differ by stage with the stage's name before them; None where no pipeline
    begins with the first of them. Of SODA and GAD, it is that of GAD."""
    by_stage = {advice.stage: advice.settings for advice in advices}
    if any(stage in by_stage for stage in NEEDS_CRITIC):
        by_stage.pop("soda", None)
    stages = [stage for stage in SCRIPTS if stage in by_stage]
    if stages[0] != "seqkd":
        return None
    shared = set.intersection(*(set(settings.items()) for settings in by_stage.values()))
    words = [f"{key}={value}" for key, value in by_stage["seqkd"].items() if (key, value) in shared]
    for stage in stages:
        words += [f"{stage}.{key}={value}" for key, value in by_stage[stage].items() if (key, value) not in shared]
    names = f"--model MODEL --data TRAIN --val VAL --exp_name NAME --stages {','.join(stages)}"
    return f"{called_as('verl.pipeline')} {names} {' '.join(words)}"


def in_words(advice: Advice) -> list[Sequence[str]]:
    """(setting, reason) of each number."""
    return [(f"{key}={advice.settings[key]}" if key in advice.settings else key, why) for key, why in advice.reasons]
