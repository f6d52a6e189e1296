"""The console command: what is said before anything is imported, and that a subcommand is what its module is alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.chain import write_chain
from verl.cli import main as cli
from verl.cli.commands import VERL, Command, Group
from verl.config.critic import DiscriminatorConfig
from verl.config.run import DataConfig
from verl.tools.command import choices_of
from verl.trainer.ppo.discriminator_algos import POOLINGS
from verl.utils.command_line import SUBCOMMANDS

ROOT = Path(__file__).parents[2]
VERL_COMMAND = [sys.executable, "-m", "verl.cli"]
HEAVY = {"torch", "transformers", "pandas", "ray"}


def leaves(group: Group = VERL, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], Command]:
    """Every subcommand with the words that call it."""
    found = {}
    for name, command in group.commands.items():
        words = (*before, name)
        found |= leaves(command, words) if isinstance(command, Group) else {words: command}
    return found


LEAVES = {words: command for words, command in leaves().items() if command.is_there()}


def run(*arguments: str, **options):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("words", [(), ("data",), *LEAVES], ids=" ".join)
def test_help_is_quick_short_and_has_an_example(words):
    code = (
        f"import sys\nsys.argv = ['verl', *{words}, '--help']\nfrom verl.cli.main import main\n"
        f"try: sys.exit(main())\nfinally: sys.stderr.write(str({HEAVY} & set(sys.modules)))"
    )
    # The clock of this process alone: the machine may be busy.
    measured = f"import resource, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)\n"
    measured += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    done = run(sys.executable, "-c", measured)
    assert done.returncode == 0 and done.stderr == "set()", done.stderr
    text, _, seconds = done.stdout.rstrip().rpartition("\n")
    lines, called = text.splitlines(), " ".join(("verl", *words))
    assert float(seconds) < 3
    assert lines[0].startswith(f"usage: {called}") and len(lines) < 40
    assert max(map(len, lines)) < 121
    assert called in re.split(r"(?m)^examples?:", text)[1]


def test_the_list_has_a_line_for_each_and_the_version_is_the_packages(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verl", "--help"])
    assert cli.main() == 0
    listed = re.findall(r"(?m)^  (\w+) +\S.*$", capsys.readouterr().out)
    assert listed == list(VERL.commands) and "distill" in listed
    monkeypatch.setattr(sys, "argv", ["verl", "--version"])
    assert cli.main() == 0
    version = re.search('__version__ = "(.+)"', (ROOT / "verl/__init__.py").read_text())[1]
    assert capsys.readouterr().out == f"verl {version}\n"
    monkeypatch.setattr(sys, "argv", ["verl"])
    assert cli.main() == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean `verl train`?"),
        (["JUDGE"], "there is no command 'JUDGE'; did you mean `verl judge`?"),
        (["lenghts", "--data", "x"], "there is no command 'lenghts'; did you mean `verl data lengths`?"),
        (["data", "colect"], "there is no command 'colect'; did you mean `verl data collect`?"),
        (["data", "zzzz"], "expected one of collect, convert, check, split, lengths, compare"),
        (["--verison"], "there is no option '--verison'"),
        (["蒸馏"], "there is no command '蒸馏': expected one of distill, train"),
    ],
)
def test_an_unknown_subcommand_gets_the_nearest(words, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verl", *words])
    assert cli.main() == 2
    heard = capsys.readouterr()
    assert said in heard.err and heard.out == "" and len(heard.err.splitlines()) == 1


def test_a_module_that_is_missing_is_said_and_one_that_is_broken_is_not_hidden(tmp_path, capsys, monkeypatch):
    group = Group("", {"gone": Command("", "verl.gone.command"), "broken": Command("", "broken_part.command")}, "")
    assert cli.dispatch(group, "verl", ["gone"]) == 2
    said = capsys.readouterr().err
    assert said == "verl gone: error: this installation has no module verl.gone.command; install verl anew\n"
    (tmp_path / "broken_part").mkdir()
    (tmp_path / "broken_part/__init__.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        cli.dispatch(group, "verl", ["broken"])


def test_exit_codes_and_reports_are_those_of_the_module(tmp_path):
    steps = [{"step": n, "data": {"critic/d_acc": 0.99}} for n in range(60)]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for arguments, code in (([str(run_dir)], 1), ([str(tmp_path / "none")], 2), (["--list"], 0), (["--lang", "fr"], 2)):
        done, alone = run(*VERL_COMMAND, "monitor", *arguments), run(sys.executable, "-m", "verl.monitor", *arguments)
        assert (done.returncode, alone.returncode) == (code, code)
        assert done.stdout == alone.stdout
        # Usage lines are broken by the length of the name.
        last, last_alone = (each.stderr.splitlines()[-1:] for each in (done, alone))
        assert [line.replace("verl monitor", "python -m verl.monitor") for line in last] == last_alone


def test_the_names_that_are_offered_are_those_of_the_subcommands():
    modules = {" ".join(words): command.module for words, command in leaves().items()}
    assert sorted(SUBCOMMANDS.values()) == sorted(modules)
    for offered, name in SUBCOMMANDS.items():
        # What `python -m` runs and the module that the subcommand calls are of one package.
        module = offered.replace(" ", ".")
        assert modules[name].rpartition(".")[0] in (module, module.rpartition(".")[0])


def test_merge_needs_no_second_word(capsys, monkeypatch, tmp_path):
    said = []
    for words in (["merge"], []):
        arguments = [*words, "--local_dir", str(tmp_path / "none"), "--target_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["verl", "merge", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said.append((end.value.code, capsys.readouterr().err))
    assert said[0] == said[1] and said[0][0] == 2
    assert said[0][1].startswith("error: ") and "none" in said[0][1]


def test_ctrl_c_ends_a_subcommand_as_it_ends_the_module(tmp_path):
    folder = write_chain(tmp_path / "model", "ab")
    ends = []
    for command in ([*VERL_COMMAND, "chat"], [sys.executable, "-m", "verl.tools.chat"]):
        process = subprocess.Popen(
            [*command, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ab\n"
        # It waits for the next line.
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        ends.append((process.returncode, said.splitlines()[-1]))
    assert ends[0] == ends[1] == (-signal.SIGINT, "KeyboardInterrupt")


def test_choices_are_those_of_the_trainers_settings():
    assert set(choices_of(DataConfig, "truncation")) == {"error", "left", "right", "middle"}
    assert choices_of(DataConfig, "special_token_text") == ("text", "token")
    assert choices_of(DiscriminatorConfig, "pooling") == POOLINGS


def test_all_flags_are_explained_on_request_and_named_without(capsys):
    from verl.tools.judge.options import build_parser

    parser = build_parser()
    flags = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
    for asked, explained in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([asked])
        said = capsys.readouterr().out
        assert end.value.code == 0 and all(name in said for name in flags)
        assert ("repetitions (default: 3)" in said) == explained
