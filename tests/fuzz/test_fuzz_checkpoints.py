"""Whatever happens to a run's folder: what is loaded from it is what was saved, to the bit, or nothing is, with a
sentence. A real run's checkpoints, resumed from by the run's own trainer, merged, and handed to the next stage."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.e2e.running import assert_equal_tensors, train
from tests.fuzz.fuzzing import refused_or, tries
from tests.tiny import write_data, write_model
from verl.model_merger import merge
from verl.models.loading import load_model
from verl.trainer.in_process import InProcessRunner, InProcessTrainer
from verl.trainer.ppo.checkpointing import Checkpoints
from verl.trainer.ppo.origin import check_same_run
from verl.utils.checkpoint.checkpoint_manager import HELD_OUT_FILE, REPLAY_FILE, step_of
from verl.utils.checkpoint.recovery import clear_up

STEPS = 3
TRACKER = "latest_checkpointed_iteration.txt"
# What a folder may be renamed to, and files that may lie beside others.
NAMES = (
    "x", "global_step_7", "global_step_1.tmp", "global_step_2.old", "global_step_3.pruned", "actor.pruned", "best",
)  # fmt: skip
STRAYS = (
    "z.safetensors", "shard-00001-model-00002-of-00002.safetensors", "x.tmp", "config.json", "model.safetensors",
)  # fmt: skip


class Remembering(InProcessTrainer):
    """A trainer that keeps what it saved in memory too, by step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.remembered = {}

    def write_checkpoint(self, step, only_as_best=False):
        state = super().write_checkpoint(step, only_as_best)
        self.remembered[step] = (state, in_memory(self.checkpoints))
        return state


def in_memory(checkpoints: Checkpoints) -> dict[str, torch.Tensor]:
    """Every tensor of the models and their optimizers, and what is replayed."""
    found = {}
    for name, group in checkpoints.parts.items():
        part = group.worker.checkpoint
        for key, tensor in {**part._weights(), **part._optimizer_state()[0]}.items():
            found[f"{name} {key}"] = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().detach().clone()
        found[f"{name} schedule"] = torch.tensor(part.lr_scheduler.state_dict()["last_epoch"])
    for name, kept in checkpoints.files.items():
        with tempfile.TemporaryDirectory() as folder:
            kept.save(Path(folder) / "file")
            if not (Path(folder) / "file").exists():
                continue
            found |= {f"{name} {key}": tensor for key, tensor in load_file(Path(folder) / "file").items()}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a GAD run, and its trainer."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_model(folder / "base")
    write_data(folder / "train.jsonl", rows=18)
    write_data(folder / "val.jsonl", rows=5)
    trainers = []

    class Kept(Remembering):
        def fit(self):
            trainers.append(self)
            super().fit()

    class Runner(InProcessRunner):
        trainer_class = Kept

    settings = (
        "stage=warmup", f"critic.model.path={folder}/base", "trainer.critic_warmup=1", "critic.replay.capacity=48",
        "critic.replay.fraction=0.25", "trainer.save_freq=1", f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=1", "trainer.val_before_train=False", "trainer.best_metric=val/rouge-L/mean",
    )  # fmt: skip
    run = train(folder, "x", *settings, run_with=lambda config: Runner().run(config))
    (trainer,) = trainers
    assert sorted(trainer.remembered) == list(range(1, STEPS + 1))
    assert {path.name for path in (run / f"global_step_{STEPS}").iterdir()} >= {REPLAY_FILE, HELD_OUT_FILE}
    return run, trainer


# ---- damage: each takes the run's folder and two numbers that choose


def _file(root: Path, choice: int) -> Path:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return files[choice % len(files)]


def _any(root: Path, choice: int) -> Path:
    paths = sorted(root.rglob("*"))
    return paths[choice % len(paths)]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def truncate(root, choice, other):
    file = _file(root, choice)
    os.truncate(file, other % (file.stat().st_size + 1))


def flip(root, choice, other):
    file = _file(root, choice)
    content = bytearray(file.read_bytes())
    if content:
        content[other % len(content)] ^= 1 << other % 8
        file.write_bytes(content)


def append(root, choice, other):
    with _file(root, choice).open("ab") as file:
        file.write(bytes([other % 256]))


def empty(root, choice, other):
    _file(root, choice).write_bytes(b"")


def nonsense(root, choice, other):
    words = (
        b"{}",
        b"[]",
        b"null",
        b'{"a": 1}',
        b"\xff" * 9,
        b"1",
        b"nan",
        b"version https://git-lfs.github.com/spec/v1",
    )
    _file(root, choice).write_bytes(words[other % len(words)])


def delete(root, choice, other):
    _remove(_any(root, choice))


def folder_for_a_file(root, choice, other):
    file = _file(root, choice)
    file.unlink()
    file.mkdir()


def copy_over(root, choice, other):
    """A file takes the place of another of the same name, or of any."""
    file = _file(root, choice)
    namesakes = sorted(path for path in root.rglob(file.name) if path.is_file() and path != file)
    source = namesakes[other % len(namesakes)] if namesakes else _file(root, other)
    if source != file:
        shutil.copy(source, file)


def swap(root, choice, other):
    """Two folders or files of the same name change places, or two steps."""
    first = _any(root, choice)
    pattern = "global_step_*" if first.name.startswith("global_step_") else first.name
    namesakes = sorted(path for path in root.rglob(pattern) if path != first)
    if namesakes:
        second, aside = namesakes[other % len(namesakes)], root / "aside"
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


def rename(root, choice, other):
    path = _any(root, choice)
    target = path.with_name(NAMES[other % len(NAMES)])
    if not os.path.lexists(target):
        path.rename(target)


def extra(root, choice, other):
    path = _any(root, choice)
    parent = path if path.is_dir() else path.parent
    target = parent / STRAYS[other % len(STRAYS)]
    if not target.exists():
        shutil.copy(_file(root, other), target)


def tracker(root, choice, other):
    words = ("", "0", "2", "02", " 2\n", "7", "-1", "1e0", "../x", "１", "9" * 30, "\x00", "global_step_2", "2 3")
    (root / TRACKER).write_text(words[other % len(words)])


def announced(root, choice, other):
    (root / TRACKER).with_suffix(".tmp").write_text(("", "1", "2", "x", "7", "../x")[other % 6])


def link(root, choice, other):
    """A link, in the place of something: to its like, to nothing, to itself or to the whole."""
    path = _any(root, choice)
    targets = (_any(root, other), Path("nothing"), Path(path.name), root)
    target = targets[other % 4]
    apart = target != path and path not in target.parents and target not in path.parents
    if apart or other % 4:
        _remove(path)
        path.symlink_to(target)


def moved_and_linked(root, choice, other):
    """As people do when a disk is full: all of it is still there."""
    path = _any(root, choice)
    elsewhere = root.with_name(f"elsewhere{len(list(root.parent.iterdir()))}")
    if not path.is_symlink():
        path.rename(elsewhere)
        path.symlink_to(elsewhere)


def forbid(root, choice, other):
    path = _any(root, choice)
    if not path.is_symlink():
        path.chmod((0o000, 0o444, 0o200)[other % 3])


DAMAGES = (
    truncate, flip, append, empty, nonsense, delete, folder_for_a_file, copy_over, swap, rename, extra, tracker,
    announced, link, moved_and_linked, forbid,
)  # fmt: skip
damages = st.lists(
    st.tuples(st.sampled_from(DAMAGES), st.integers(0, 999), st.integers(0, 99_999)), min_size=1, max_size=3
)


def damaged_copy(run: Path, folder: str, what) -> Path:
    root = Path(folder) / run.name
    shutil.copytree(run, root, symlinks=True)
    for damage, choice, other in what:
        if any(path.is_file() for path in root.rglob("*")):
            damage(root, choice, other)
    return root


# ---- what reads them


def resume(trainer: InProcessTrainer, root: Path, mode: str, named: str):
    """As a run does it; the trainer's state, None where it starts afresh."""
    settings = replace(
        trainer.config.trainer, default_local_dir=str(root), resume_mode=mode, resume_from_path=str(root / named)
    )
    config = replace(trainer.config, trainer=settings)
    clear_up(root)
    checkpoints = Checkpoints(settings, *trainer.checkpoints.parts.values(), trainer.checkpoints.files, trainer.origin)
    folder = checkpoints.find()
    if folder is None:
        left = [path.name for path in root.glob("global_step_*") if path.suffix != ".damaged"]
        assert mode == "disable" or not left, "it would start afresh beside checkpoints"
        return None
    check_same_run(folder, trainer.origin, config)
    state = checkpoints.load(folder)
    assert state.global_step == step_of(folder)
    return state


@tries(50)
@given(
    what=damages,
    mode=st.sampled_from(["auto", "auto", "resume_path", "disable"]),
    named=st.sampled_from([f"global_step_{STEPS}", "global_step_2", "best"]),
)
def test_a_run_resumes_from_what_was_saved(run, what, mode, named):
    original, trainer = run
    with tempfile.TemporaryDirectory() as folder:
        root = damaged_copy(original, folder, what)
        state = refused_or(lambda: resume(trainer, root, mode, named))
        if state is not None:
            saved, tensors = trainer.remembered[state.global_step]
            assert state == saved
            assert_equal_tensors(in_memory(trainer.checkpoints), tensors)


@tries(50)
@given(
    what=damages,
    named=st.sampled_from([f"global_step_{STEPS}", "global_step_2", "best", "."]),
    part=st.sampled_from(["actor", "actor", "critic", "."]),
    merged=st.booleans(),
)
def test_a_model_is_handed_over_as_it_was_saved(run, what, named, part, merged):
    original, trainer = run
    kind = "score" if part == "critic" else "policy"
    with tempfile.TemporaryDirectory() as folder:
        root = damaged_copy(original, folder, what)
        source = root / named / part

        def hand_over():
            path = merge(source, Path(folder) / "merged") if merged else source
            return load_model(path, kind, fresh_head=False)

        model = refused_or(hand_over)
        if model is not None:
            found = {f"{part} {name}": tensor for name, tensor in model.state_dict().items()}
            candidates = [tensors for _, tensors in trainer.remembered.values()]
            assert any(
                all(torch.equal(found[name], tensors[name]) for name in found if name in tensors)
                for tensors in candidates
            )
