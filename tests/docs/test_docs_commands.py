"""The commands in README and docs are taken as they stand: flags, settings, targets, extras and files are there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.docs.doc_blocks import blocks, blocks_of
from tests.docs.doc_commands import RUN_BY, Command, Wrong, check, commands, kind_of, targets
from tests.tiny import write_data, write_model
from verl.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("verl data check", "verl data split", "verl data lengths", "verl data compare")


def shown(*kinds: str) -> list[Command]:
    """All commands of the pages, or those of some kinds."""
    found = [command for page in PAGES for command in commands(blocks(page))]
    return [command for command in found if not kinds or kind_of(command) in kinds]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_taken_as_it_stands(page, tmp_path):
    wrong = []
    for command in commands(blocks(page)):
        try:
            check(command, tmp_path)
        except Wrong as error:
            wrong.append(f"{command}\n    {error}")
    assert wrong == [], "\n".join(wrong)


def test_the_pages_have_commands_of_every_kind():
    kinds = {kind_of(command) for command in shown()}
    assert {"verl train", "verl merge", "verl chat", "stage script", "make", "pip", *RUN} <= kinds


@pytest.mark.parametrize("kind", RUN_BY)
def test_the_test_that_runs_a_kind_is_there(kind):
    where = RUN_BY[kind]
    if "::" in where:
        file, _, name = where.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert (name in tests) if name else any(test.startswith("test_") for test in tests)


def test_every_target_of_make_is_run_by_ci_or_named_here():
    run = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert run <= targets()
    rest = {"help", "install", "quickstart", "test-fast", "test-faults", "docs", "format", "clean"}
    assert targets() - run == rest


# ---- run as they stand


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages' data commands name, and a tiny model for every name of one."""
    write_model(tmp_path / "BASE")
    for name in ("MODEL", "models/base"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "BASE")
    (tmp_path / "data").mkdir()
    from pandas import read_json

    quickstart = tmp_path / "outputs/quickstart"
    quickstart.mkdir(parents=True)
    (quickstart / "base").symlink_to(tmp_path / "BASE")
    names = ("data/teacher", "data/train", "data/test", "data/judge", "train", "test")
    for number, name in enumerate((*names, "outputs/quickstart/train", "outputs/quickstart/test")):
        rows = read_json(
            write_data(tmp_path / "rows.jsonl", rows=600 if name == "data/teacher" else 40 + number), lines=True
        )
        rows["content"] = [[{"role": "user", "content": f"{name} {m[0]['content']}"}] for m in rows["content"]]
        rows.to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_commands_run_as_they_stand(folder, capsys, monkeypatch):
    """All but those that are usage rather than commands, with $BASE for a model; 1 is a finding of check's."""
    ran = set()
    # The pages in Chinese have the same lines: once is enough.
    for command in {tuple(command.words): command for command in shown(*RUN)}.values():
        kind = kind_of(command)
        given = command.words[3:]  # Behind `verl data NAME` and `python -m verl.data_tools.NAME` alike.
        arguments = [word.replace("$BASE", "BASE") for word in given]
        arguments = ["60" if word == "300" else word for word in arguments]  # There are a few hundred rows.
        if any(word.isupper() and not (folder / word).exists() for word in arguments) or "..." in arguments:
            continue
        if kind == "verl data split":
            for name in ("train", "test", "judge"):
                (folder / "data" / f"{name}.parquet").unlink()
        monkeypatch.setattr(sys, "argv", ["verl", *kind.split()[1:], *arguments])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert code in (None, 0, 1) and "Traceback" not in said.err, f"{command}\n{said.err}"
        assert code != 1 or kind == "verl data check", f"{command}\n{said.err}"
        ran.add(kind)
    assert ran == set(RUN)


# ---- the check itself


def faults(text: str, tmp_path: Path) -> list[str]:
    """What is said against the commands of a page of this text."""
    said = []
    for command in commands(blocks_of(text, ROOT / "docs/page.md")):
        try:
            check(command, tmp_path)
        except Wrong as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("verl distil --model BASE", "no command distil"),
        ("verl data chek x.parquet", "no command chek"),
        ("verl distill --model BASE --data T --val V --exp_name N --no_such_flag", "--no_such_flag"),
        ("verl distill --model BASE --data T --val V --exp_name N data.no_such=1", "data.no_such"),
        ("verl distill --model BASE --data T --val V --exp_name N --stages gad,seqkd", "order"),
        ("verl train stage=seqkd data.train_file=x", "data.train_file"),
        ("python -m verl.trainer.main_ppo stage=sft", "stage=sft"),
        ("python -m verl.trainer.main_ppo stage=gad data.train_batch_size=many", "data.train_batch_size"),
        ("bash scripts/train/gpt5-8b-gad-gspo.sh --model M --exp_name N --nnodes 1", "--reward_model"),
        ("bash scripts/train/gpt5-8b-gad-gspo.sh ... data.no_such=1", "data.no_such"),
        ("bash scripts/train/gpt5-8b-dpo.sh --model M --exp_name N", "gpt5-8b-dpo"),
        ("verl merge --local_dir D --target_dir T --target_folder T", "--target_folder"),
        ("python scripts/legacy_model_merger.py merge --backend fsdp --loca_dir D --target_dir T", "--local_dir"),
        ("verl chat student --temprature 0", "--temprature"),
        ("printf 'x' | verl chat student --temprature 0 > a.txt", "--temprature"),
        ("VERL_CACHE_DIR=/x verl data split d.parquet --out D --no_such 1", "--no_such"),
        ("python -m verl.monitr RUN", "verl.monitr"),
        ("python -m benchmarks.step --shpae 1.5b", "--shpae"),
        ("python -m examples.quickstart.run --devise cuda", "--devise"),
        ("make tests", "no target tests"),
        ("pip install '.[gpus]'", "no extra gpus"),
        ("pip install . -c constraint.txt", "constraint.txt"),
    ],
)
def test_a_wrong_command_is_found_wherever_it_stands(line, says, tmp_path):
    for page in (
        f"    {line}\n",
        f"```bash\n{line}  # said so\n```\n",
        f"1. So:\n\n        {line.replace(' --', chr(92) + chr(10) + '            --')}\n",
    ):
        said = faults(f"# Page\n\n{page}", tmp_path)
        assert len(said) == 1 and says in said[0], said


def test_an_unknown_program_in_a_shell_is_asked_about(tmp_path):
    assert "nothing here knows" in faults("```bash\nfrobnicate --now\n```\n", tmp_path)[0]
    assert faults("```yaml\nverl: no such command\n```\n\n    verl/\n      tree.py\n", tmp_path) == []
