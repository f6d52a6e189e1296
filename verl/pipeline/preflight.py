"""Everything that can be seen before a stage starts, of all stages at once: settings, models, data, room."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from verl.config.run import Config
from verl.memory.check import check_run_memory
from verl.memory.estimate import host_memory
from verl.models.finding import is_discriminator
from verl.models.tokenizer import all_eos_token_ids, load_tokenizer
from verl.pipeline.options import STAGES
from verl.pipeline.settings import Models, compose, run_folder, unused_settings, user_settings
from verl.pipeline.state import State, handed_on
from verl.tools.judge.answers import read_prompts, refuse_trained
from verl.trainer.config import ConfigError
from verl.trainer.config.paths import with_absolute_paths
from verl.trainer.first_look import check_device, check_engine, check_ray_folder
from verl.trainer.looking_over import create_rl_dataset
from verl.trainer.ppo.batches import count_steps
from verl.trainer.ppo.disk import checkpoint_parts, merged_parameters
from verl.trainer.ppo.model_checks import check_models, check_tokens
from verl.trainer.ppo.origin import Origin
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in, tracked_step
from verl.utils.checkpoint.room import Part
from verl.utils.dataset.rl_dataset import RLHFDataset, find_files
from verl.utils.dataset.tokenizer_checks import check_ids
from verl.utils.hub import parse_hub_name
from verl.utils.refusals import sentences_of
from verl.utils.tracking import check_loggers

# What adapters are made of, by its names among a model's settings.
ADAPTERS = (
    "lora_rank", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora", "load_in_4bit",
)  # fmt: skip


@dataclass
class Look:
    """A stage as it would run now.

    config: None where its settings are wrong. finished: its last step, if it is done. steps: all that it makes; None
    where that cannot be told. parts: the models in its checkpoints; empty where they were not measured.
    merged: parameters of its merged student; 0 where they were not measured.
    """

    stage: str
    models: Models
    config: Config | None = None
    finished: int | None = None
    done: int = 0
    steps: int | None = None
    rows: int | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    merged: int = 0


class Preflight:
    """Looks at all stages of a line, in order, and keeps every problem with the stages that have it.

    Args:
        measure: also work out what a dry run shows.
    """

    def __init__(self, options: Namespace, state: State, measure: bool = False):
        self.options, self.state, self.measure = options, state, measure
        self.looks: list[Look] = []
        self._problems: dict[str, list[str]] = {}
        # Flags of data files that are not there, which nobody reads then.
        self._unread: set[str] = set()
        # Data sets by all that they were read with, or what was wrong with them.
        self._kept: dict[str, RLHFDataset | Exception] = {}

    @property
    def problems(self) -> list[str]:
        """Each once, behind the stages that have it."""
        return [f"{', '.join(stages)}: {problem}" for problem, stages in self._problems.items()]

    def look(self) -> None:
        """Look at the data files, at every stage, and at what comes after them."""
        for flag, names in (("--data", self.options.data), ("--val", self.options.val)):
            for name in names:
                self._look_at_file(flag, name)
        files = dict(self._problems)
        try:
            for stage in self.options.stages:
                self._look_at(stage)
            # Settings for other stages are to be settings all the same.
            for stage in STAGES:
                if any(stage in setting.stages for setting in unused_settings(self.options)):
                    self._compose(Look(stage, Models(self.options.model, self._first_critic())))
        except ConfigError as error:
            # Of the command line itself.
            self._problems = files | {sentence: ["settings"] for sentence in error.problems}
            return
        if not self.options.no_judge:
            self._try("judge", _load_judge)
            if not self._unread and any(look.config for look in self.looks):
                self._try("judge", self._look_at_prompts)
        self._kept.clear()

    def look_at(self, number: int) -> Look:
        """The stage of this number, from 1, once those before it are done."""
        for stage in self.options.stages[:number]:
            self._look_at(stage)
        self._kept.clear()
        return self.looks[-1]

    def _try(self, what: str, look: Callable[[], Any]) -> Any:
        """What `look` returns; None where it fails, its sentence being a problem of `what`."""
        try:
            return look()
        except (OSError, ValueError, ImportError) as error:
            for sentence in sentences_of(error):
                stages = self._problems.setdefault(sentence, [])
                if what not in stages:
                    stages.append(what)
        return None

    def _look_at_file(self, flag: str, name: str) -> None:
        """Whether a data file is there, whatever else is wrong. Names of the hub are asked for with the stages."""
        known = set(self._problems)
        self._try(flag, lambda: parse_hub_name(name, "dataset") or find_files(name))
        if set(self._problems) != known:
            self._unread.add(flag)

    # ------------------------------------------------------------ a stage

    def _first_critic(self) -> str:
        return self.options.reward_model or self.options.model

    def _models(self) -> Models:
        """What the next stage begins with, as far as it is there."""
        before = self.looks[-1] if self.looks else None
        if before is None:
            return Models(self.options.model, self._first_critic())
        has_critic = before.stage == "warmup"
        if before.finished is None or before.config is None:
            return Models(self.options.model, self._first_critic(), pending=True)
        folder = handed_on(run_folder(self.options, before.stage), before.config)
        return Models(str(folder / "actor"), str(folder / "critic") if has_critic else self._first_critic())

    def _look_at(self, stage: str) -> None:
        look = Look(stage, self._models())
        look.config = self._compose(look)
        warmed = bool(self.looks) and self.looks[-1].stage == "warmup"
        run = run_folder(self.options, stage)
        if look.config is not None:
            # Whether one is done that begins with what is still to be made can be told only then.
            if not look.models.pending:
                look.finished = self._try(stage, lambda: self.state.finished(stage))
            look.done = look.finished or self._try(stage, lambda: tracked_step(run)) or 0
            if look.done and look.models.pending:
                self._try(stage, lambda: self._refuse_orphan(look))
            if look.finished is None:
                self._look_at_inputs(look, warmed)
            elif not self._unread:
                self._try(stage, lambda: self._refuse_changes(look))
        self.looks.append(look)

    def _compose(self, look: Look) -> Config | None:
        return self._try(look.stage, lambda: with_absolute_paths(compose(self.options, look.stage, look.models)))

    def _look_at_inputs(self, look: Look, warmed: bool) -> None:
        """Models and data of a stage that is still to be made."""
        stage, config = look.stage, look.config
        self._try(stage, lambda: check_loggers(config.trainer.logger))
        self._try(stage, lambda: check_engine(config))
        if not self.measure:
            # A dry run may be on another machine than the run.
            self._try(stage, lambda: check_device(config))
            self._try(stage, lambda: check_ray_folder(config))
        if look.models.pending:
            self._try(stage, lambda: self._refuse_other_adapters(look))
        if stage == "gad" and not warmed:
            self._try(stage, lambda: _refuse_untaught(config))
        # Whether the discriminator has learned is asked above: one that is still to be made will have.
        trainer = replace(config.trainer, critic_warmup=config.trainer.critic_warmup or 1)
        tokenizer = self._try(stage, lambda: check_models(replace(config, trainer=trainer)))
        usable = tokenizer is not None
        tokenizer = tokenizer if usable else _plain_tokenizer(config)
        if tokenizer is None or self._unread:
            return
        train = self._rows(look, tokenizer, config.data.train_files, config.data.train_max_samples)
        val = self._rows(look, tokenizer, config.data.val_files, config.data.val_max_samples)
        if train is None or val is None:
            return
        look.rows = len(train)
        look.steps = self._try(stage, lambda: count_steps(config, len(train)))
        if not usable:
            return
        self._try(stage, lambda: check_tokens(config, tokenizer, [train, val]))
        own_tokens = self._try(stage, lambda: OwnTokens.of(config, tokenizer))
        if own_tokens is not None:
            self._try(stage, lambda: [own_tokens.with_prompts(rows) for rows in (train, val)])
        if not look.models.pending and look.done:
            self._try(stage, lambda: self._refuse_another_run(look))
        if self.measure:
            self._try(stage, lambda: self._measure(look))

    def _refuse_other_adapters(self, look: Look) -> None:
        """ValueError if a stage asks for other adapters than one before it is to make, whose training goes on."""
        parts = {"actor_rollout_ref": self.looks, "critic": self.looks[-1:] if self.looks[-1].stage == "warmup" else []}
        for part, before in parts.items():
            now = getattr(look.config, part).model
            made = [(each.stage, getattr(each.config, part).model) for each in before if each.config is not None]
            for stage, model in [(stage, model) for stage, model in made if model.lora_rank][-1:]:
                other = [
                    f"{name}={getattr(now, name)}, not {getattr(model, name)}"
                    for name in ADAPTERS
                    if getattr(now, name) != getattr(model, name)
                ]
                if now.lora_rank and other:
                    raise ValueError(
                        f"goes on with the adapters of {stage}, and {part}.model asks for others ({'; '.join(other)}): "
                        f"give both stages the same, or leave {part}.model.lora_rank out of this one"
                    )

    def _rows(
        self, look: Look, tokenizer: PreTrainedTokenizerBase, files: str | list[str], samples: int
    ) -> RLHFDataset | None:
        """A data set as a stage reads it; stages that read the same share it, and its problems."""
        model, data = look.config.actor_rollout_ref.model, replace(look.config.data, train_batch_size=1)
        key = f"{files} {samples} {model.path} {model.tokenizer_path} {data}"

        def read() -> RLHFDataset:
            if key not in self._kept:
                ends = all_eos_token_ids(tokenizer, model.path)
                try:
                    self._kept[key] = create_rl_dataset(files, data, tokenizer, samples, ends)
                except (OSError, ValueError) as error:
                    self._kept[key] = error
            if isinstance(self._kept[key], Exception):
                raise self._kept[key]
            return self._kept[key]

        return self._try(look.stage, read)

    # ------------------------------------------------------------ what is there already

    def _refuse_orphan(self, look: Look) -> None:
        """ValueError if a stage is there, and nothing of the one that it began with."""
        before = run_folder(self.options, self.looks[-1].stage)
        if not checkpoints_in(before):
            raise ValueError(
                f"began with what an earlier {before.name} handed on, and {before} holds no checkpoint any more: move "
                f"{run_folder(self.options, look.stage)} away too, to make both anew, or bring {before.name} back"
            )

    def _refuse_changes(self, look: Look) -> None:
        """ValueError if a finished stage would be another one now."""
        found = self._changes(look)
        before = _origin(run_folder(self.options, look.stage) / f"global_step_{look.finished}")
        if before is not None:
            # Rows are told by the files' contents; their number is not counted again.
            found += before.differences(Origin.of(look.config, before.rows))
        if found:
            raise ValueError(
                f"is finished, and was made otherwise: {'; '.join(found)}. Leave that as it was, give it to the later "
                "stages alone (STAGE.KEY=VALUE), take another --exp_name, or move "
                f"{run_folder(self.options, look.stage)} away to make this stage anew"
            )

    def _refuse_another_run(self, look: Look) -> None:
        """ValueError if a stage that was begun would go on as another one; the trainer would refuse it too."""
        folder = run_folder(self.options, look.stage) / f"global_step_{look.done}"
        before = _origin(folder)
        found = [] if before is None else before.differences(Origin.of(look.config, look.rows))
        if look.steps is not None and look.done >= look.steps:
            # Its last step is made, and only the word of it is missing.
            found += self._changes(look)
        if found:
            raise ValueError(
                f"was begun otherwise: {'; '.join(found)}. Leave that as it was, take another --exp_name, or move "
                f"{run_folder(self.options, look.stage)} away to make this stage anew"
            )

    def _changes(self, look: Look) -> list[str]:
        return self.state.changes(look.stage, look.config, user_settings(self.options)[look.stage])

    def _look_at_prompts(self) -> None:
        """Whether the validation rows can be judged on."""
        data = next(look.config for look in self.looks if look.config).data
        try:
            if data.turns != "none":
                raise ValueError(f"it reads no conversations of several turns (data.turns={data.turns})")
            prompts, _ = read_prompts(listed(data.val_files), data.prompt_key, data.response_key)
            refuse_trained(prompts, listed(data.train_files), data.prompt_key)
        except ValueError as error:
            raise ValueError(f"{error} (or do without it: --no_judge)") from error

    # ------------------------------------------------------------ what a dry run shows

    def _measure(self, look: Look) -> None:
        """Sizes, and whether the memory of this machine's GPU will do."""
        config, look.parts = look.config, checkpoint_parts(look.config)
        look.merged = merged_parameters(config)
        if config.trainer.device == "cuda" and torch.cuda.is_available():
            check_run_memory(config, (torch.cuda.get_device_properties(0).total_memory, host_memory()))


def _load_judge() -> None:
    """ImportError if the judge, which begins when everything is trained, lacks a package."""
    try:
        import_module("verl.tools.judge.run")
    except ImportError as error:
        raise ImportError(
            f"it does not start here: {error}. Install what requirements.txt names, or do without it: --no_judge"
        ) from error


def _plain_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that cannot be used, to count rows and steps with; None where it cannot be either."""
    model = config.actor_rollout_ref.model
    with suppress(OSError, ValueError):
        tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
        check_ids(tokenizer)
        return tokenizer
    return None


def _refuse_untaught(config: Config) -> None:
    path = config.critic.model.path
    learns_first = config.trainer.critic_warmup != 0 or config.trainer.warmup_use_sft
    if not learns_first and not is_discriminator(path):
        raise ValueError(
            "nothing has taught the discriminator, and an untrained one would reward noise: put warmup before it "
            "(--stages seqkd,warmup,gad), name the critic that a warmup has left (--reward_model .../critic), or let "
            "it learn first (gad.trainer.critic_warmup=auto)"
        )


def _origin(checkpoint: Path) -> Origin | None:
    """None where there is none, or one that cannot be read: what is damaged is the trainer's to tell."""
    try:
        return Origin.read(checkpoint)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def listed(files: str | list[str]) -> list[str]:
    """One file or several, as a list."""
    return [files] if isinstance(files, str) else list(files)
