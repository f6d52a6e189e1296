"""What keeps a run from starting, as a user sees it: through the real `main()`, up to where Ray would start."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny import byte_tokenizer, scorer, write_data, write_model
from verl.model_merger.cli import main as merge
from verl.trainer import main_ppo
from verl.trainer.config import compose_config
from verl.trainer.first_look import without_idle_critic
from verl.utils import refusals
from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename
from verl.utils.dataset.cache import file_digest
from verl.utils.refusals import Findings, Refused, is_reason, sentences_of
from verl.utils.run_lock import only_run_in

ROOT = Path(__file__).parents[2]
MODEL = "actor_rollout_ref.model.path"


class Started(Exception):
    """Everything was found right."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    write_model(path / "base")
    scorer().save_pretrained(path / "critic")
    byte_tokenizer().save_pretrained(path / "critic")
    write_data(path / "train.jsonl", rows=12)
    write_data(path / "val.jsonl", rows=4)
    return path


@pytest.fixture
def start(folder, tmp_path, monkeypatch, capfd) -> Iterator[Callable[..., list[str]]]:
    """`start(*overrides)`: what the command prints to standard error, a line each; "started" if nothing was wrong."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VERL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VERL_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers = list(logging.getLogger().handlers)

    def begin(runner, config):
        raise Started

    monkeypatch.setattr(main_ppo.TaskRunner, "start", begin)
    given = {
        "trainer.device": "cpu", "data.train_files": "train.jsonl", "data.val_files": "val.jsonl",
        "data.train_batch_size": "4", "data.max_prompt_length": "40", "data.max_response_length": "20", MODEL: "base",
        "critic.model.path": "critic", "trainer.experiment_name": "x", "trainer.logger": "[console]",
        "trainer.default_local_dir": str(tmp_path / "run"),
    }  # fmt: skip

    def run(*overrides: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["main_ppo", *(f"{key}={value}" for key, value in given.items()), *overrides])
        capfd.readouterr()
        code = 0
        try:
            main_ppo.main()
        except Started:
            code = "started"
        except SystemExit as end:
            code = end.code
        lines = capfd.readouterr().err.splitlines()
        assert "Traceback (most recent call last):" not in lines
        assert code in ("started", main_ppo.REFUSED, 0)
        return [*lines, "started"] if code == "started" else lines

    yield run
    logging.getLogger().handlers[:] = handlers


def errors(lines: list[str]) -> list[str]:
    assert lines[-1] != "started"
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def test_what_is_right_starts(start):
    assert start()[-1] == "started"


# ---- everything at once


def test_everything_that_is_missing_is_told_together(start):
    found = errors(
        start("data.train_files=no.jsonl", "data.val_files=nor.jsonl", f"{MODEL}=m1", "critic.model.path=m2",
              "trainer.validation_data_dir=/proc/v", "trainer.rollout_data_dir=/proc/r")
    )  # fmt: skip
    assert len(found) == 6
    for part in ("no.jsonl", "nor.jsonl", "m1 does not exist", "m2 does not exist", "validation_data_dir: /proc/v",
                 "rollout_data_dir: /proc/r"):  # fmt: skip
        assert sum(part in line for line in found) == 1, (part, found)


def test_a_folder_that_cannot_be_written_hides_nothing(start):
    found = errors(start("trainer.default_local_dir=/proc/x", "data.val_files=nor.jsonl", f"{MODEL}=m1"))
    assert len(found) == 3 and found[0].startswith("trainer.default_local_dir: /proc/x cannot be written")


def test_a_folder_for_rays_files_that_cannot_be_written_is_told_with_the_rest(start, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/x")
    ray, model = errors(start(f"{MODEL}=m1"))
    assert ray.startswith("RAY_TMPDIR: /proc/x/ray, ") and "m1 does not exist" in model
    # One's own cluster has its files where it was started.
    assert errors(start(f"{MODEL}=m1", "ray_kwargs.ray_init.address=10.0.0.1:6379")) == [model]


def test_a_start_beside_another_run_leaves_its_checkpoints_alone(start, tmp_path):
    """One that is being written is not whole yet."""
    run = tmp_path / "run"
    (run / "global_step_3" / "actor").mkdir(parents=True)
    Path(get_checkpoint_tracker_filename(run)).write_text("3")
    with only_run_in(run):
        first, second = errors(start("data.val_files=nor.jsonl"))
    assert "another run is at work in" in first and "nor.jsonl" in second
    assert [folder.name for folder in run.glob("global_step_*")] == ["global_step_3"]


def test_settings_that_contradict_and_files_that_are_missing(start):
    found = errors(start("algorithm.gamma=0.5", "data.val_files=nor.jsonl", f"{MODEL}=m1"))
    assert [any(part in line for line in found) for part in ("gamma=0.5", "nor.jsonl", "m1 does not exist")] == [
        True
    ] * 3


def test_both_data_files_are_looked_at(start, folder):
    (folder / "p.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 20)
    (folder / "u.jsonl").write_bytes((folder / "val.jsonl").read_text().encode("utf-16"))
    first, second = errors(start("data.train_files=p.jsonl", "data.val_files=u.jsonl"))
    # One sentence for all rows, not one per row.
    assert first.startswith("p.jsonl, row 0: there is no column 'content', only 'prompt', 'response', and so it ")
    assert "data_tools.convert" in first and "u.jsonl, line 1 (from 1) is not UTF-8 but UTF-16" in second


# ---- the command line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage=sekqd"], "stage=sekqd is not known: did you mean seqkd? There are gad, gad_short, seqkd, "),
        (["stage=GAD"], "stage=GAD is not known: did you mean gad? "),
        (["data.val_files=None"], "write data.val_files=null for none"),
        (["data.seed", "=", "5"], "data.seed = 5: write data.seed=5, without spaces around '='"),
        (["data.seed", "=5"], "data.seed =5: write data.seed=5, without spaces"),
        (["data.seed=", "5"], "data.seed= 5: write data.seed=5, without spaces"),
        (["data.train_max_samples", "=", "-1"], "write data.train_max_samples=-1, without spaces around '='"),
        (["trainer.nnodes\uff1d2"], "its equals sign is a full-width one; write trainer.nnodes=2"),
        (["data.train_files=a.jsonl\uff0cb.jsonl"], "several files are written as a list, [a.parquet,b.parquet]"),
        (["trainer.logger=[console\uff0cfile]"], "several as trainer.logger=[console,file]"),
        (["trainer.nnodes=1,2"], "trainer.nnodes: input should be a valid integer"),
        (["trainer.project_name=${foo}"], "trainer.project_name: Interpolation key 'foo' not found"),
        (["~data.seed"], "~data.seed: keys cannot be removed, only set"),
        (["--lr=1e-6"], "--lr=1e-6: no such flag; a setting is written without dashes, lr=1e-6"),
        (["--resume_step", "5"], "--resume_step: a run goes on from its newest checkpoint by itself"),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/no"], "trainer.resume_from_path=/no does not"),
    ],
)  # fmt: skip
def test_one_line(start, overrides, said):
    found = errors(start(*overrides))
    assert len(found) == 1 and said in found[0], found


def test_faults_of_a_command_line_are_told_together(start):
    assert len(errors(start("~data.seed", "gad", "--foo"))) == 3


def test_rows_beyond_the_context_of_both_models(start):
    found = errors(start("data.max_prompt_length=400"))
    assert [" = 420 is above max_position_embeddings=256" in line for line in found] == [True, True]


def test_a_gpu_that_is_not_there(start):
    for engine in ("vllm", "hf"):
        assert errors(start("trainer.device=cuda", f"actor_rollout_ref.rollout.name={engine}"))[0].startswith(
            "trainer.device=cuda, and torch finds no GPU on this machine: set trainer.device=cpu"
        )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.max_response_length=1", "leaves one token of every answer"),
        ("actor_rollout_ref.rollout.temperature=5", "temperature=5.0: above 2"),
        ("actor_rollout_ref.actor.optim.lr=1", "actor_rollout_ref.actor.optim.lr=1 undoes a pretrained model"),
        ("critic.optim.lr=1", "critic.optim.lr=1 undoes"),
        ("data.train_batch_size=20", "more than the 12 rows there are: a step has each row 1.67 times"),
        ("data.val_files=./train.jsonl", "which is training data"),
    ],
)
def test_what_is_hardly_meant_is_warned_of(start, override, said):
    lines = start(override)
    assert lines[-1] == "started" and sum("WARNING" in line and said in line for line in lines) == 1, lines


@pytest.mark.parametrize("text", ["蒸馏 (一)", "a=b", "~x", "it's #1"])
def test_text_of_any_kind_is_a_name(start, text):
    assert start(f"trainer.project_name={text}")[-1] == "started"


def test_a_validation_needs_no_discriminator(start):
    lines = start("critic.model.path=base", "trainer.val_only=True")
    assert lines[-1] == "started" and any("no discriminator takes part" in line for line in lines)


@pytest.mark.parametrize(
    ("resume", "takes_part"),
    [
        ([], True),
        (["trainer.resume_mode=disable"], False),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path={run}/global_step_3"], True),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path={run}/global_step_2"], False),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path={run}/no"], True),  # Refused, with all else.
    ],
)
def test_a_validation_has_the_discriminator_of_its_checkpoint(folder, tmp_path, resume, takes_part):
    """A warmup's `critic.model.path` is a language model from the first step to the last."""
    (tmp_path / "global_step_3" / "critic").mkdir(parents=True)
    (tmp_path / "global_step_2" / "actor").mkdir(parents=True)
    config = compose_config(
        ["stage=warmup", "trainer.val_only=True", "data.train_files=t.jsonl", "data.val_files=v.jsonl",
         f"{MODEL}={folder}/base", f"critic.model.path={folder}/base", "trainer.experiment_name=x",
         f"trainer.default_local_dir={tmp_path}", *(setting.format(run=tmp_path) for setting in resume)]
    )  # fmt: skip
    assert without_idle_critic(config).use_critic == takes_part


# ---- models


def changed(**entries) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | entries
        (model / "config.json").write_text(json.dumps(config))

    return change


def holding(**files: str) -> Callable[[Path], None]:
    """Only these files; `__` stands for a slash."""

    def change(model: Path) -> None:
        shutil.rmtree(model)
        for name, text in files.items():
            path = model / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        for name in names:
            (model / name).unlink(missing_ok=True)

    return change


BERT, T5 = '{"model_type": "bert"}', '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
MODELS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "adapter": (
        holding(**{"adapter_config.json": '{"base_model_name_or_path": "/not/there"}'}),
        "",
        "/not/there, is not there: copy it there",
    ),
    "gguf": (holding(**{"m.gguf": "GGUF"}), "", "is GGUF, which is made for inference"),
    "gguf file": (holding(**{"m.gguf": "GGUF"}), "m.gguf", "is GGUF, which is made for inference"),
    "file": (changed(), "model.safetensors", "is a file of weights and no model folder"),
    "gptq": (
        changed(quantization_config={"quant_method": "gptq"}),
        "",
        "quantised weights (gptq), which cannot be trained",
    ),
    "awq": (changed(quantization_config={"quant_method": "awq"}), "", "quantised weights (awq)"),
    "pointer": (
        lambda model: (model / "model.safetensors").write_text("version https://git-lfs\n"),
        "",
        "model.safetensors is a Git LFS pointer",
    ),
    "cut": (
        lambda model: os.truncate(model / "model.safetensors", 3000),
        "",
        "model.safetensors is damaged or cut short",
    ),
    "no weights": (without("model.safetensors"), "", "holds no weights"),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        "",
        "holds no tokenizer: expected tokenizer.json",
    ),
    "tokenizer": (
        lambda model: (model / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "Fancy"}}'),
        "",
        "the tokenizer in ",
    ),
    "sizes": (changed(hidden_size="large"), "", "'hidden_size' expected int"),
    "no template": (without("chat_template.jinja"), "", "has no chat template"),
    "t5": (
        lambda model: (model / "config.json").write_text(T5),
        "",
        "type t5 cannot be built as a language model: transformers has no such class",
    ),
    "images": (
        lambda model: (model / "config.json").write_text('{"model_type": "clip"}'),
        "",
        "type clip cannot be built as a language model",
    ),
    "unknown": (
        lambda model: (model / "config.json").write_text('{"model_type": "fancy"}'),
        "",
        "type fancy, which the installed transformers does not know",
    ),
    "code": (
        changed(model_type="own", auto_map={"AutoConfig": "c.C"}),
        "",
        "set actor_rollout_ref.model.trust_remote_code=True",
    ),
    "classic": (
        holding(**{"model_world_size_1_rank_0.pt": "x"}),
        "",
        "verl's classic trainer and has to be merged first",
    ),
    "classic's files": (
        holding(
            **{
                "model_world_size_1_rank_0.pt": "x",
                "huggingface__config.json": "{}",
                "huggingface__tokenizer.json": "{}",
            }
        ),
        "huggingface",
        "",
    ),
    "run": (holding(**{"global_step_9__actor__x": "", "global_step_10__actor__x": ""}), "", "the newest is "),
    "step": (holding(**{"actor__x": ""}), "", "did you mean "),
    "empty": (holding(**{".hidden__x": ""}), "", "holds no model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model(start, folder, tmp_path, name):
    change, inside, said = MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(folder / "base", model)
    change(model)
    found = errors(start(f"{MODEL}={model / inside}"))
    assert len(found) == 1 and said in found[0] and str(model) in found[0], found
    if name == "run":
        assert found[0].endswith("global_step_10/actor")


def test_the_huggingface_folder_of_a_checkpoint_names_its_parent(start, folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "actor" / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "actor" / "model").mkdir()
    (problem,) = errors(start(f"{MODEL}={tmp_path}/actor/huggingface"))
    assert problem.endswith(f"pass its parent, {tmp_path}/actor")


# ---- data


ROW = {"content": [{"role": "user", "content": "q"}], "teacher_response": "a"}
FILES: dict[str, tuple[str, bytes, str]] = {
    "gbk": (
        "d.jsonl",
        json.dumps(ROW | {"teacher_response": "红的"}, ensure_ascii=False).encode("gbk"),
        "line 1 (from 1) is not UTF-8 (byte 0xba): save the file as UTF-8 (iconv -f GB18030 -t UTF-8)",
    ),
    "array": ("d.jsonl", json.dumps([ROW]).encode(), "is a JSON array and not JSON lines"),
    "pointer": ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "parquet": ("d.jsonl", b"PAR1xxxx", "is a parquet file by its content: name it .parquet"),
    "page": ("d.jsonl", b"<!DOCTYPE html>", "is a web page"),
    "pointer as parquet": (
        "d.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "a Git LFS pointer (run `git lfs pull`",
    ),
    "page as parquet": ("d.parquet", b"<html>", "a web page"),
    "lines as parquet": ("d.parquet", json.dumps(ROW).encode(), "but JSON (name it .jsonl"),
    "csv": ("d.csv", b"a,b", "ends in none of .parquet, .jsonl: `python -m verl.data_tools.convert`"),
    "parts": (
        "d.jsonl",
        json.dumps(ROW | {"content": [{"role": "user", "content": [{"type": "text"}]}]}).encode(),
        "its content is a list of parts",
    ),
    "sharegpt": (
        "d.jsonl",
        json.dumps(ROW | {"content": [{"from": "human", "value": "q"}]}).encode(),
        "has no role and no content, only from, value",
    ),
    "text of json": ("d.jsonl", json.dumps(ROW | {"content": "[]"}).encode(), "but str, a text of JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_data(start, tmp_path, name):
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    lines = start(f"data.train_files={tmp_path / file}")
    assert lines[-1] != "started" and said in "\n".join(lines) and file in "\n".join(lines), lines


def test_a_folder_is_no_file(start, folder):
    (problem,) = errors(start(f"data.train_files={folder}"))
    assert f"{folder} is a folder and not a data file: name files in it, {folder}/" in problem


# ---- the voice itself


def test_a_fault_of_the_code_is_no_reason(tmp_path):
    findings = Findings()
    with findings.gathered():
        raise_from_here = FileNotFoundError(2, "No such file", "x")
        raise raise_from_here
    assert sentences_of(findings.errors[0]) == ["x: No such file"]
    # Raised by a test, not by the package; and inside a call of the package's.
    with pytest.raises(ValueError, match="fault"), findings.gathered():
        raise ValueError("fault")
    with pytest.raises(KeyError), findings.gathered():
        raise KeyError("x")
    with findings.gathered():
        file_digest(tmp_path / "missing")
    with pytest.raises(Refused) as caught:
        findings.tell()
    assert len(caught.value.problems) == 2 and not is_reason(KeyError("x"))


SOURCE = """
def several_lines(x):
    with open(__file__):
        raise RuntimeError(
            f"{x} is "
            "not meant"
        ) from None

def on_the_way(x):
    try:
        several_lines(x)
    finally:
        print(x)

def of_another(x):
    try:
        int(x)
    except ValueError as error:
        raise ValueError(f"{x} is no number") from error

def ran_into(x):
    return int(x)

def unpacked(x):
    first, second = x
    return first

def imported(x):
    import not_there_at_all
"""


def test_what_is_raised_on_purpose_is_told_from_what_a_line_ran_into(tmp_path, monkeypatch):
    (tmp_path / "purposes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(refusals, "PACKAGE", tmp_path)
    purposes = importlib.import_module("purposes")
    found = {}
    for name in ("several_lines", "on_the_way", "of_another", "ran_into", "unpacked", "imported"):
        with pytest.raises((ValueError, RuntimeError, ImportError)) as caught:
            getattr(purposes, name)("x")
        found[name] = is_reason(caught.value)
    assert [name for name in found if found[name]] == ["several_lines", "on_the_way", "of_another"]
    monkeypatch.setattr(refusals, "PACKAGE", tmp_path / "elsewhere")
    with pytest.raises(RuntimeError) as caught:
        purposes.several_lines("x")
    assert not is_reason(caught.value)


def test_the_merger_cannot_write_there(folder, capsys):
    with pytest.raises(SystemExit) as end:
        merge(["merge", "--backend", "fsdp", "--local_dir", str(folder / "nothing"), "--target_dir", "/proc/x"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_traceback_for_those_who_ask(folder, tmp_path):
    """The real command, once without and once with it."""
    command = [
        sys.executable, "-m", "verl.trainer.main_ppo", "stage=seqkd", "data.train_files=no.jsonl", f"{MODEL}=no",
        "trainer.experiment_name=x", "trainer.device=cpu",
    ]  # fmt: skip
    for asked in ("", "1"):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=400,
            env=os.environ | {"PYTHONPATH": str(ROOT), "VERL_TRACEBACK": asked},
        )  # fmt: skip
        assert done.returncode == main_ppo.REFUSED
        assert ("Traceback" in done.stderr) == bool(asked)
        assert "no.jsonl" in done.stderr and "model folder" in done.stderr
