"""Help of the training command, whose arguments Hydra reads; nothing here imports torch, so that it is quick."""

from __future__ import annotations

import argparse

from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import say

HELP = ("-h", "--help")
DESCRIPTION = "Trains one stage. Every setting is KEY=VALUE; what is wrong with them is said before anything starts."
EPILOG = """\
A run has to be given data.train_files, actor_rollout_ref.model.path and trainer.experiment_name; stages warmup and
gad critic.model.path too. The same command goes on where it was ended.

settings that are set most often:
  data.val_files=FILE  data.train_batch_size=N  data.max_prompt_length=N  data.max_response_length=N
  actor_rollout_ref.actor.optim.lr=X  critic.optim.lr=X  actor_rollout_ref.rollout.n=N
  trainer.n_gpus_per_node=N  trainer.total_epochs=N  trainer.save_freq=N  trainer.default_local_dir=DIR
All of them, each with a line on what it means, are in verl/trainer/config/*.yaml.

examples:
  {called} stage=seqkd data.train_files=data/train.parquet actor_rollout_ref.model.path=BASE \\
      trainer.experiment_name=seqkd
  {called} stage=gad_short ... --cfg job
"""


def build_parser() -> argparse.ArgumentParser:
    """What the command takes, for help and completion; Hydra reads it."""
    called = called_as("verl.trainer.main_ppo")
    parser = argparse.ArgumentParser(
        prog=called,
        usage=f"{called} stage=STAGE KEY=VALUE ... [flags]",
        description=DESCRIPTION,
        epilog=EPILOG.format(called=called),
        formatter_class=wide_formatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="stage=STAGE", help="seqkd, warmup, gad, gad_short or soda")
    add("--cfg", choices=("job", "hydra", "all"), help="print the settings and train nothing")
    add("--resolve", action="store_true", help="with --cfg: what follows from other settings has its value")
    add("--package", metavar="KEY", help="with --cfg: the settings under this key alone")
    add("--info", nargs="?", metavar="WHAT", help="how the settings were composed")
    add("--hydra-help", action="store_true", help="further flags, of Hydra")
    return parser


def asked_for_help(arguments: list[str]) -> bool:
    """Print the help, if it is asked for."""
    asked = any(argument in HELP for argument in arguments)
    if asked:
        say(build_parser().format_help().rstrip("\n"))
    return asked
