"""The subcommands: a line on each, and where it is."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: `module` has its `main`, and `parser`, or else that too, its `build_parser`. Neither is imported
    before the subcommand is called."""

    summary: str
    module: str
    parser: str | None = None

    def is_there(self) -> bool:
        """Whether the module exists; what goes wrong in its package's import is raised."""
        return find_spec(self.module.rpartition(".")[0]) is not None and find_spec(self.module) is not None


class Group(NamedTuple):
    """A subcommand with subcommands of its own."""

    summary: str
    commands: dict[str, Command]
    example: str


DATA = Group(
    "collect, convert, check, split, lengths, compare: from prompts to data that trains",
    {
        "collect": Command("ask a teacher for answers to prompts", "verl.data_tools.collect.command"),
        "convert": Command("make rows that train of any usual format", "verl.data_tools.convert.command"),
        "check": Command("look for what would spoil training", "verl.data_tools.check.command"),
        "split": Command("train, validation and judge sets without a common prompt", "verl.data_tools.split"),
        "lengths": Command("count tokens, and find settings that fit them", "verl.data_tools.lengths.command"),
        "compare": Command("how two sets differ, and whether it is chance", "verl.data_tools.compare.command"),
    },
    "verl data check data/train.parquet --against data/test.parquet",
)
VERL = Group(
    "Black-box distillation: a student learns to answer like a teacher that can only be asked for text.",
    {
        "distill": Command(
            "SeqKD, or any stages one after the other, merged and judged",
            "verl.pipeline.command",
            "verl.pipeline.options",
        ),
        "train": Command("one stage, with settings as KEY=VALUE", "verl.trainer.command"),
        "launch": Command("one run on several machines, which come together and end together", "verl.launch.command"),
        "merge": Command("a checkpoint becomes a Hugging Face folder", "verl.model_merger.cli"),
        "chat": Command("talk to a student in the terminal", "verl.tools.chat.command"),
        "monitor": Command("is a run healthy? alarms, causes, a report of several runs", "verl.monitor.__main__"),
        "judge": Command("how close students are to the teacher", "verl.tools.judge.command"),
        "score": Command("how well a discriminator tells answers apart", "verl.tools.score.command"),
        "data": DATA,
        "completion": Command("what your shell completes commands and flags with", "verl.cli.completion"),
    },
    "verl train stage=seqkd data.train_files=data/train.parquet actor_rollout_ref.model.path=BASE \\\n"
    "             trainer.experiment_name=seqkd",
)
