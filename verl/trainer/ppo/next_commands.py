"""The commands that go on from a run's end, ready to paste: the next stage, the merger, the judge, the report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import verl
from verl.config.run import Config
from verl.trainer.ppo.run_record import changed_settings, preset_of
from verl.utils.checkpoint.best_link import BEST, best_step
from verl.utils.command_line import by_console, called_as, goes_on_by_itself

# In a checkout that is a link to `scripts/train`.
SCRIPTS = (Path(verl.__file__).parent / "scripts" / "train").resolve()
# By preset: the next one, and its script.
NEXT = {"seqkd": ("warmup", "gpt5-8b-warmup-gspo.sh"), "warmup": ("gad", "gpt5-8b-gad-gspo.sh")}
# Settings that the next stage most likely takes over, where they are not the preset's.
TAKEN_OVER = ("data.", "trainer.project_name", "trainer.device", "trainer.n_gpus_per_node")
# Settings that the judge knows under the same name.
FOR_THE_JUDGE = ("prompt_key", "max_prompt_length", "max_response_length")


def closing_commands(config: Config, root: Path, newest: int, total_steps: int) -> list[str]:
    """The lines for a run in `root` that is at its end, each with a command on its best checkpoint or, where there is
    none, its newest: the next stage, the merger, the judge. No line where a pipeline, which does all of it, has started
    the run."""
    if goes_on_by_itself():
        return []
    checkpoint = root / (BEST if best_step(root) is not None and best_is_meant(config) else f"global_step_{newest}")
    changed = {key: now for key, (_, now) in changed_settings(config).items()}
    lines = [_next_stage(config, checkpoint, total_steps, changed)]
    if config.frozen_actor_steps < total_steps:
        # Otherwise the student is what it was before.
        lines += [_merger(config, checkpoint / "actor"), _judge(config, checkpoint / "actor", root, changed)]
    return [line for line in lines if line is not None]


def report_command(root: Path) -> str | None:
    """The line for the report; None where the run has kept no metrics to make it of, or a pipeline writes it."""
    if goes_on_by_itself() or not (root / "metrics.jsonl").is_file():
        return None
    return f"a report of it: {_command('verl.monitor', root, '--html', root / 'report.html')}"


def best_is_meant(config: Config) -> bool:
    """Whether the next stage begins with the best checkpoint, where there is one. A warmup trains the discriminator, of
    which a metric of the student's answers says nothing."""
    metric = config.trainer.best_metric or ""
    return config.stage != "warmup" or metric.startswith("val/critic/")


def _next_stage(config: Config, checkpoint: Path, total_steps: int, changed: dict[str, Any]) -> str | None:
    preset = preset_of(config)
    # A GAD run that was all head start is a warmup.
    before = "warmup" if config.stage == "warmup" and config.frozen_actor_steps >= total_steps else preset
    if before not in NEXT:
        return None
    stage, script = NEXT[before]
    actor, critic = checkpoint / "actor", checkpoint / ("critic" if config.use_critic else "actor")
    name = config.trainer.experiment_name
    own = stage if name.lower() == before else f"{name.removesuffix(f'-{before}')}-{stage}"
    taken = [f"{key}={_value(value)}" for key, value in changed.items() if key.startswith(TAKEN_OVER)]
    if by_console():
        settings = [f"stage={stage}", f"actor_rollout_ref.model.path={actor}", f"critic.model.path={critic}"]
        settings += [f"trainer.experiment_name={own}", f"trainer.nnodes={config.trainer.nnodes}"]
        command = _command("verl.trainer.main_ppo", *settings, *taken)
    else:
        flags = ["--model", actor, "--reward_model", critic, "--exp_name", own, "--nnodes", config.trainer.nnodes]
        command = _shell(["bash", _from_here(SCRIPTS / script), *flags, *taken])
    return f"the next stage, {stage}: {command}"


def _merger(config: Config, actor: Path) -> str:
    target = f"merged/{config.trainer.experiment_name}"
    command = _command("verl.model_merger", "--local_dir", actor, "--target_dir", target)
    return f"for transformers and vLLM: {command}"


def _judge(config: Config, actor: Path, root: Path, changed: dict[str, Any]) -> str | None:
    if config.data.val_files is None:
        return None
    files = [config.data.val_files] if isinstance(config.data.val_files, str) else config.data.val_files
    base, name = config.actor_rollout_ref.model.path, config.trainer.experiment_name
    flags = ["--data", *map(_absolute, files), "--student", f"before={base}", "--student", f"{name}={actor}"]
    flags += ["--judge_model", base, "--out", root / "judge"]
    for key in FOR_THE_JUDGE:
        if f"data.{key}" in changed:
            flags += [f"--{key}", changed[f"data.{key}"]]
    return f"is it closer to the teacher? {_command('verl.tools.judge', *flags)}"


def _value(value: Any) -> str:
    """A setting's value as the command line takes it; files by their whole paths."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    return _absolute(value) if isinstance(value, str) else str(value)


def _absolute(text: str) -> str:
    """The whole path of a file that is there; any other text as it is."""
    return str(Path(text).absolute()) if text and len(text) < 1000 and Path(text).is_file() else text


def _from_here(path: Path) -> str:
    """A path below the working folder from there on, any other whole."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _command(module: str, *arguments: object) -> str:
    return f"{called_as(module)} {_shell(arguments)}"


def _shell(words: Sequence[object]) -> str:
    return shlex.join(map(str, words))
