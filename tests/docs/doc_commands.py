"""The commands that the documents show, and whether the project takes them as they stand.

A command is told by its first words (`kind_of`), never by its text, so that pages may change. Each kind has a check:

- a command with flags is started in this process as it stands and stopped once its own parser has taken them;
- settings (KEY=VALUE) are composed by Hydra and checked as a whole, as `--cfg job` does;
- a stage script is run by bash with a Python that only tells what it was called with;
- targets of make, extras of pip, and files of the repository have to be there.

`RUN_BY` names a test that runs each kind for real, or why none does. Words in capitals stand for what the reader gives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from tests.docs.doc_blocks import Block
from verl.cli.commands import VERL, Group
from verl.cli.main import main as verl_main
from verl.pipeline.options import parse_options
from verl.pipeline.settings import Models, compose
from verl.trainer.config import ConfigError, normalize_overrides
from verl.trainer.config.loading import check_shown

ROOT = Path(__file__).parents[2]
# Fences that hold no commands.
NO_COMMANDS = {"yaml", "json", "jsonl", "python", "text", "toml", "diff", "html", "markdown", "mermaid"}
# Programs of others, which are not held to anything but the files of this repository that they are given.
OTHERS = {
    *("source", "export", "cd", "printf", "echo", "cat", "tee", "eval", "sed", "for", "do", "done", "ls", "mkdir"),
    *("head", "tail", "wc", "cp", "mv", "rm", "ln", "kill", "nohup", "tmux", "ssh", "scp", "rsync", "curl", "git"),
    *("docker", "kubectl", "sbatch", "srun", "ray", "hf", "huggingface-cli", "vllm", "tensorboard", "wandb", "swanlab"),
    *("mlflow", "nvidia-smi", "sudo", "apt-get", "uv", "python3.12", "trl", "accelerate", "torchrun", "pytest", "ruff"),
}  # fmt: skip
# Modules of others that `python -m` runs.
OTHERS_MODULES = {"venv", "pip", "pytest", "http.server", "json.tool", "tensorboard.main"}
NEEDS_GPUS, OTHERS_WORK, NEEDS_HOURS = "needs GPUs", "is another project's", "takes hours"
# Which test runs a kind for real; or why none does.
RUN_BY = {
    "verl": "tests/cli/test_cli_packaging.py::test_its_subcommands_answer_away_from_the_checkout",
    "verl distill": "tests/e2e/test_pl_whole.py::test_a_stage_more_on_what_is_there",
    "verl train": "tests/e2e/test_stages.py::test_the_actor_is_frozen_for_critic_warmup_steps",
    "verl launch": "tests/faults/test_nodes_launched.py::"
    "test_a_signal_to_a_worker_ends_the_run_with_a_checkpoint_and_both_nodes_with_its_exit_code",
    "verl merge": "tests/e2e/test_stages.py::test_merged_actor_gives_the_trainers_own_greedy_text",
    "verl chat": "tests/cli/test_cli_chat.py::test_lines_through_a_pipe_are_answered_until_quit",
    "verl monitor": "tests/monitor/test_monitor_command.py::"
    "test_a_healthy_run_ends_with_0_and_a_sick_one_with_1_in_a_process",
    "verl judge": "tests/tools/test_judge.py::",
    "verl score": "tests/tools/test_score.py::",
    "verl completion": "tests/cli/test_cli_completion.py::test_the_other_shells_get_a_script_too",
    "verl data collect": "tests/data_tools/test_dt_collect.py::test_answers_become_rows_in_the_prompts_order",
    "verl data convert": "tests/data_tools/test_dt_convert_files.py::test_every_shape_of_json",
    **{f"verl data {name}": "tests/docs/test_docs_commands.py::test_data_commands_run_as_they_stand"
       for name in ("check", "split", "lengths", "compare")},
    "stage script": "tests/e2e/test_data_howto.py::test_from_an_api_key_to_a_trained_student",
    "pipeline script": "tests/e2e/test_pl_whole.py::test_a_dry_run_shows_all_stages_and_writes_nothing",
    "make": "tests/docs/test_docs_commands.py::test_every_target_of_make_is_run_by_ci_or_named_here",
    "pip": "tests/cli/test_cli_packaging.py::test_tested_versions_are_of_everything_that_is_asked_for_and_fit",
    "examples.quickstart.run": "tests/faults/test_quickstart_output.py::"
    "test_a_start_is_short_and_files_hold_no_control_characters",
    "examples.quickstart.seeds": "tests/examples/test_quickstart_seeds.py::test_the_table_and_what_is_left_to_do",
    "examples.quickstart.tiny_model": "tests/e2e/test_data_howto.py::test_from_an_api_key_to_a_trained_student",
    "examples.grammar_world": NEEDS_HOURS,
    "examples.real_text": NEEDS_GPUS,
    "examples/toy_modes.py": "tests/examples/test_toy_modes.py::",
    "benchmarks": NEEDS_GPUS,
    "docs_site.generate": "tests/docs/test_docs_reference.py::test_a_page_that_was_changed_by_hand_is_refused",
    "verl.monitor.table": "tests/monitor/test_monitor_rules.py::",
    "others": OTHERS_WORK,
}  # fmt: skip


class Command(NamedTuple):
    """A command of a page, as words, and where it stands."""

    file: Path
    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {shlex.join(self.words)}"


class Wrong(Exception):
    """A command that the project does not take, and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def commands(blocks: list[Block]) -> Iterator[Command]:
    """The commands in blocks of code, those of a pipe and of a list one by one."""
    for block in blocks:
        if not block.level and block.language not in NO_COMMANDS:
            for offset, line in _logical_lines(block.text):
                for words in _parts(line):
                    if words and _is_command(words, block.language):
                        yield Command(block.file, block.line + offset, words)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    start, held = 0, ""
    for number, line in enumerate(text.splitlines()):
        if not held:
            start = number
        if line.rstrip().endswith("\\"):
            held += line.rstrip()[:-1] + " "
        else:
            yield start, held + line
            held = ""


def _parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without prompts, comments, assignments and redirections."""
    line = re.sub(r"^\s*\$ ", "", line)
    line = re.sub(r"\$\(.*?\)(?=[\s\"]|$)", "", line) if not re.match(r"\w+=\$\(", line) else ""
    # A usage's brackets: what may be left out.
    line = re.sub(r"(?<=\s)\[(--[^\]]*)\]", r"\1", line)
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split, reader.commenters = True, ""
    try:
        tokens = list(reader)
    except ValueError:
        return
    words: list[str] = []
    skip = False
    for token in [*tokens, ";"]:
        if token.startswith("#"):
            break
        if set(token) <= set("|&;"):
            yield _named(words)
            words = []
        elif set(token) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            words.append(token)
    yield _named(words)


def _named(words: list[str]) -> list[str]:
    """Without the assignments before a command."""
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    return words


def _is_command(words: list[str], language: str) -> bool:
    """Whether a line of code is one: in a fence for a shell every line is, elsewhere those of our own programs."""
    first, second = words[0], words[1] if len(words) > 1 else ""
    if language in ("bash", "sh", "shell", "console"):
        return True
    if first in ("python", "python3"):
        return second == "-m" or second.endswith(".py")
    if first in ("bash", "make", "pip"):
        return bool(second)
    return first == "verl"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds


def kind_of(command: Command) -> str:
    """A command's kind, a key of `RUN_BY`; Wrong where it has none."""
    words = command.words
    first, rest = words[0], words[1:]
    if first == "verl":
        return _of_verl(rest)
    if first in ("python", "python3") and rest[:1] == ["-m"] and len(rest) > 1:
        return _of_module(rest[1])
    if first in ("python", "python3") and rest and rest[0].endswith("legacy_model_merger.py"):
        return "verl merge"
    if first in ("python", "python3") and rest:
        if (ROOT / rest[0]).is_file():
            return rest[0]
        if rest[0].endswith(".py") or rest[0] == "-c":
            return "others"
    if first == "bash" and rest:
        return "pipeline script" if rest[0].endswith("/pipeline.sh") else "stage script"
    if first in ("make", "pip"):
        return first
    if first in OTHERS or first.startswith((".", "/", "$", "(", "{")):
        return "others"
    raise Wrong(f"nothing here knows the program {first}: see tests/docs/doc_commands.py")


def _of_verl(words: list[str]) -> str:
    if not words or words[0].startswith("-"):
        return "verl"
    found = VERL.commands.get(words[0])
    if found is None:
        raise Wrong(f"verl has no command {words[0]}")
    if isinstance(found, Group):
        # NAME stands for each of the group's.
        if len(words) < 2 or words[1].startswith("-") or words[1] == "NAME":
            return "verl"
        if words[1] not in found.commands:
            raise Wrong(f"verl {words[0]} has no command {words[1]}")
        return f"verl {words[0]} {words[1]}"
    return f"verl {words[0]}"


def _of_module(module: str) -> str:
    if module.split(".")[0] in OTHERS_MODULES or module in OTHERS_MODULES:
        return "others"
    for name, found in VERL.commands.items():
        inner = {f"{name} {sub}": each for sub, each in found.commands.items()} if isinstance(found, Group) else {}
        for sub, each in (inner or {name: found}).items():
            package = each.module.removesuffix(".command").removesuffix(".__main__").removesuffix(".cli")
            if module in (each.module, package):
                return f"verl {sub}"
    if module == "verl.trainer.main_ppo":
        return "verl train"
    if module == "verl.cli":
        return "verl"
    if not any((ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in (".py", "")):
        raise Wrong(f"there is no module {module}")
    known = (kind for kind in RUN_BY if module == kind or module.startswith(f"{kind}."))
    kind = max(known, key=len, default=None)
    if kind is None:
        raise Wrong(f"nothing says which test runs {module}: see RUN_BY in tests/docs/doc_commands.py")
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check(command: Command, folder: Path) -> None:
    """Raises Wrong where the project does not take a command as it stands. `folder`: to work in."""
    kind, words = kind_of(command), command.words
    for word in words:
        if re.match(r"(scripts|examples|docker|benchmarks|tests)/", word) and "*" not in word:
            _there(word.split("::")[0])
    if kind in ("others", "verl"):
        return
    if any(word in ("--help", "-h", "--help_all", "--version") for word in words) and kind != "stage script":
        return
    if kind == "verl train":
        check_settings([word for word in words if "=" in word and not word.startswith("-")])
    elif kind == "stage script":
        _stage_script(words, folder)
    elif kind == "make":
        _make(words[1:])
    elif kind == "pip":
        _pip(words[1:])
    else:
        _parsed(kind, words)
        if kind in ("verl distill", "pipeline script"):
            _pipeline(words)


def _there(path: str) -> None:
    if not (ROOT / path).exists():
        raise Wrong(f"there is no {path} in the repository")


def _placeholders(words: list[str]) -> list[str]:
    """Without an ellipsis and words for what may stand there; a shell's variable in small letters holds a number."""
    given = [word for word in words if word not in ("...", "[flags]", "KEY=VALUE", "[KEY=VALUE", "...]")]
    return ["64" if re.fullmatch(r"\$[a-z]+", word) else word for word in given]


def check_settings(settings: list[str]) -> None:
    """Compose settings and check them as a whole; Wrong with every problem found."""
    try:
        check_shown(normalize_overrides(_placeholders(settings)))
    except ConfigError as error:
        raise Wrong("; ".join(error.problems)) from error


class _Parsed(BaseException):
    """A command's parser has taken its command line."""


def _parsed(kind: str, words: list[str]) -> None:
    """Start a command in this process, and stop it once it has parsed its command line."""
    run, arguments = _program(kind, words)
    # A capital letter stands for a number where the flag wants one.
    given = _placeholders(arguments)
    complaint = _complaint(run, given)
    if complaint and re.search(r"'[A-Z][A-Z_]*'", complaint):
        complaint = _complaint(run, ["1" if re.fullmatch(r"[A-Z][A-Z_]*", word) else word for word in given])
    # What an ellipsis stands for may be required.
    if complaint and not ("required" in complaint and len(given) < len(arguments)):
        raise Wrong(complaint)


def _program(kind: str, words: list[str]) -> tuple[Callable[[], object], list[str]]:
    if kind.startswith("verl ") and words[0] == "verl":
        return verl_main, words[1:]
    if kind == "pipeline script":
        return lambda: runpy.run_module("verl.pipeline", run_name="__main__"), words[2:]
    if words[1] == "-m":
        return lambda: runpy.run_module(words[2], run_name="__main__"), words[3:]
    if kind == "verl merge":
        return lambda: runpy.run_module("verl.model_merger", run_name="__main__"), words[2:]
    return lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[2:]


def _complaint(run: Callable[[], object], arguments: list[str]) -> str | None:
    """What a program's parser says against a command line; None if it takes it."""
    kept = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}
    argv, said = sys.argv, io.StringIO()

    def stopping(parse: Callable) -> Callable:
        def parse_and_stop(*args: object, **kwargs: object) -> None:
            parse(*args, **kwargs)
            raise _Parsed

        return parse_and_stop

    try:
        for name, parse in kept.items():
            setattr(argparse.ArgumentParser, name, stopping(parse))
        sys.argv = [argv[0], *arguments]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            ended = run()
    except _Parsed:
        return None
    except SystemExit as end:
        ended = end.code
    finally:
        sys.argv = argv
        for name, parse in kept.items():
            setattr(argparse.ArgumentParser, name, parse)
    return None if ended in (0, None) else (said.getvalue().strip().splitlines() or [str(ended)])[-1]


def _pipeline(words: list[str]) -> None:
    """The settings of every stage of a pipeline."""
    arguments = _placeholders(words[2:])
    if not any(word == "--exp_name" for word in arguments):
        return
    options = parse_options(arguments)
    try:
        for stage in options.stages:
            compose(options, stage, Models("MODEL", "MODEL"))
    except ConfigError as error:
        raise Wrong("; ".join(error.problems)) from error


def _stage_script(words: list[str], folder: Path) -> None:
    """Run the script itself, up to where it starts Python."""
    script = ROOT / "scripts" / "train" / Path(words[1]).name
    if not (script.is_file() and words[1].startswith(("scripts/train/", "$SCRIPTS/train/"))):
        raise Wrong(f"there is no {words[1]}")
    python = folder / "python"
    python.write_text('#!/bin/bash\n[[ $1 == -c ]] && exit 0\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    arguments = words[2:]
    given = _placeholders(arguments)
    if len(given) < len(arguments):
        # An ellipsis stands for the flags that it has to have.
        critic = ["--reward_model", "MODEL"] if re.search("warmup|gad-", script.name) else []
        given = ["--model", "MODEL", "--exp_name", "NAME", *critic, *given]
    environment = os.environ | {"PYTHON": str(python), "N_GPUS_PER_NODE": "1"}
    if "--worker" not in given:
        given = [*given, "--cfg", "job"]
    done = subprocess.run(["bash", script, *given], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Wrong(done.stderr.strip().splitlines()[0])
    if "--worker" not in given:
        check_settings([line for line in done.stdout.splitlines() if "=" in line])


def targets() -> set[str]:
    """The Makefile's."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _make(words: list[str]) -> None:
    for word in words:
        if "=" not in word and not word.startswith("-") and word not in targets():
            raise Wrong(f"the Makefile has no target {word}")


def _pip(words: list[str]) -> None:
    """Extras and files of versions of this package; packages of others are their own."""
    setup = (ROOT / "setup.py").read_text()
    extras = set(re.findall(r'^    "(\w+)": ', setup, re.MULTILINE)) | {"mlflow", "swanlab", "trackio", "wandb"}
    for flag, word in zip(["", *words], words, strict=False):
        if flag in ("-c", "-r"):
            _there(word)
        own = re.fullmatch(r"(?:\.|verl)\[([\w,]+)\]", word)
        unknown = set(own[1].split(",")) - extras if own else set()
        if unknown:
            raise Wrong(f"there is no extra {', '.join(sorted(unknown))}")
        if not word.startswith(("-", ".", "/")) and flag not in ("-c", "-r") and word not in ("install", "uninstall"):
            Requirement(word)
