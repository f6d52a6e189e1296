"""Whole checkpoints: `global_step_N` folders under a run's folder, complete or absent.

A checkpoint is written to `global_step_N.tmp`, checksummed and renamed; the tracker file, which names the newest
one, changes last. What a crash leaves behind is a `.tmp` folder that nothing reads. Where a step replaces an earlier
checkpoint of the same step, a crash between the two renames leaves the earlier one as `global_step_N.old`, whole.
`recovery.py` clears up after a crash and says which checkpoint a run goes on from.

A checkpoint may be there only for being the best (`ONLY_AS_BEST` in it): it goes when it no longer is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from verl.utils.checkpoint.best_link import behind_best, best_step
from verl.utils.checkpoint.checksums import CHECKSUMS, checksums_of, read_checksums, sync_to_disk, write_checksums
from verl.utils.checkpoint.file_names import MODEL_FOLDER, OPTIM_FOLDER, is_classic
from verl.utils.checkpoint.whole import changed_files
from verl.utils.command_line import called_as

# How a user names the checkpoint to resume from.
NAMING = "trainer.resume_mode=resume_path trainer.resume_from_path=..."
ONLY_AS_BEST = "only_as_best.txt"
# Where the run was, its step among it.
STATE_FILE = "trainer_state.json"
# What the run began with.
ORIGIN_FILE = "origin.json"
# What a run with a discriminator keeps beside the models; of no use without it.
REPLAY_FILE, HELD_OUT_FILE = "replay.safetensors", "held_out.safetensors"
# What SODA keeps beside the actor.
REJECTED_FILE = "rejected.safetensors"
# The answers to the next batch, where they are written a step ahead.
AHEAD_FILE = "ahead.safetensors"
# The suffix of what is being removed.
PRUNED = ".pruned"
# The parts that can be pruned, each with the files that go with it.
PARTS = {"actor": (REJECTED_FILE, AHEAD_FILE), "critic": (REPLAY_FILE, HELD_OUT_FILE)}


def get_checkpoint_tracker_filename(root_path: str | Path) -> str:
    """The file that holds the newest checkpoint's step."""
    return str(Path(root_path) / "latest_checkpointed_iteration.txt")


def tracked_step(root: str | Path) -> int | None:
    """The step that the tracker names; None without a tracker.

    Raises:
        ValueError: it names none.
    """
    tracker = Path(get_checkpoint_tracker_filename(root))
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    # A number and nothing else: a path in its place would lead elsewhere.
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{tracker} is damaged: it should hold the newest checkpoint's step; {ways_out(root)}")
    return int(text)


def track(root: str | Path, step: int) -> None:
    """Let the tracker name this step; at every moment, a loss of power included, it names the one or the other."""
    _announce(root, step)
    follow_announcement(root)


def announcement(root: str | Path) -> Path:
    """What the tracker will be: there from before a sealed checkpoint gets its name until the tracker names it."""
    return Path(get_checkpoint_tracker_filename(root)).with_suffix(".tmp")


def _announce(root: str | Path, step: int) -> None:
    announcement(root).write_text(str(step))
    sync_to_disk(announcement(root))
    sync_to_disk(Path(root))


def follow_announcement(root: str | Path) -> None:
    """Let the tracker name what was announced."""
    os.replace(announcement(root), get_checkpoint_tracker_filename(root))
    sync_to_disk(Path(root))


def ways_out(root: str | Path) -> str:
    """What a user can do who has no tracker to go by."""
    steps = [step_of(folder) for folder in checkpoints_in(root)]
    there = f"one of the steps that lie there ({', '.join(map(str, steps))})" if steps else "an existing step"
    return (
        f"write {there} into that file, name a checkpoint with {NAMING}, "
        "or begin afresh with trainer.resume_mode=disable"
    )


def find_latest_ckpt_path(path: str | Path | None, directory_format: str = "global_step_{}") -> str | None:
    """The newest complete checkpoint under `path`, or None if there is none. Its content is not looked at.

    Raises:
        FileNotFoundError: the tracker file names a checkpoint that is gone.
        ValueError: the tracker file is damaged.
    """
    step = None if path is None else tracked_step(path)
    if step is None:
        return None
    folder = Path(path) / directory_format.format(step)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{get_checkpoint_tracker_filename(path)} names step {step}, but {folder} does not exist: restore it, or "
            f"{ways_out(path)}"
        )
    return str(folder)


def step_of(folder: str | Path) -> int:
    """The step in a `global_step_N` path, or in that behind `best`; ValueError for any other name."""
    match = re.fullmatch(r"global_step_(\d+)", behind_best(folder).name)
    if match is None:
        raise ValueError(f"{folder} is not a checkpoint: expected a folder named global_step_N")
    return int(match[1])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (CHECKSUMS, ONLY_AS_BEST))


def start_checkpoint(root: str | Path, step: int) -> Path:
    """An empty folder for writing step `step`; remains of an earlier attempt are removed. Of a link in its place only
    the link."""
    folder = Path(root) / f"global_step_{step}.tmp"
    _make_way(folder)
    folder.mkdir(parents=True)
    return folder


def _make_way(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def seal_checkpoint(temporary: Path, parts: Sequence[str] = ()) -> None:
    """Checksum what was written and have the disk take it. Each of `parts` (`actor`, `critic`) gets its own checksums
    beside the whole folder's, so that it can be checked where it was copied alone.

    Raises:
        ValueError: one of the parts was not written.
    """
    missing = [part for part in parts if not _files(temporary / part)]
    if missing:
        raise ValueError(f"{temporary} has no {', '.join(missing)}, which was to be saved: it is no checkpoint")
    names = [str(file.relative_to(temporary)) for file in _files(temporary)]
    sums = checksums_of(temporary, names, sync=True, shown=False)
    for part in parts:
        own = {name.removeprefix(f"{part}/"): value for name, value in sums.items() if name.startswith(f"{part}/")}
        write_checksums(temporary / part / CHECKSUMS, own)
    write_checksums(temporary / CHECKSUMS, sums)
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync_to_disk(folder)


def publish_checkpoint(temporary: Path) -> Path:
    """Give a sealed folder its name, and make it the newest checkpoint.

    The disk has each of these before the next: the announcement, the name, the tracker. Only then may go what the
    folder replaced.
    """
    final, replaced = temporary.with_suffix(""), temporary.with_suffix(".old")
    _announce(final.parent, step_of(final))
    if os.path.lexists(final):
        _make_way(replaced)
        final.rename(replaced)
    temporary.rename(final)
    sync_to_disk(final.parent)
    follow_announcement(final.parent)
    _make_way(replaced)
    return final


def commit_checkpoint(temporary: Path) -> Path:
    """Seal what was written and publish it."""
    seal_checkpoint(temporary)
    return publish_checkpoint(temporary)


def verify_checkpoint(folder: str | Path) -> None:
    """Compare a checkpoint with its checksums; a process reads the same files once.

    Raises:
        FileNotFoundError: it has none.
        ValueError: names the files that are missing or damaged.
    """
    damage = damage_of(Path(folder))
    if damage is not None:
        error = ValueError if (Path(folder) / CHECKSUMS).is_file() else FileNotFoundError
        raise error(f"{damage}; copy it again, or resume from another one with {NAMING}")


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    if not (folder / CHECKSUMS).is_file():
        if any(is_classic(folder / part) for part in PARTS):
            return (
                f"{folder} was written by verl's classic trainer, whose runs cannot be gone on with: merge its models "
                f"({called_as('verl.model_merger')}) and begin a run of another name with them"
            )
        return f"{folder / CHECKSUMS} is missing, and nothing else tells whether the checkpoint is whole"
    try:
        expected = read_checksums(folder / CHECKSUMS)
    except ValueError as error:
        return str(error)
    if not expected:
        return f"{folder / CHECKSUMS} is damaged: it lists no file"
    # A whole part may have been pruned; whoever needs it will say that it is missing.
    pruned = {name for part, files in PARTS.items() if not (folder / part).exists() for name in (part, *files)}
    present = {name: value for name, value in expected.items() if Path(name).parts[0] not in pruned}
    there = {name: value for name, value in present.items() if (folder / name).is_file()}
    damaged = {*(present.keys() - there.keys()), *changed_files(folder, there)}
    if damaged:
        named = ", ".join(name for name in present if name in damaged)
        return f"checkpoint {folder} is damaged: {named} missing or changed since it was written"
    foreign = [name for part in PARTS for name in _shards(folder, part) if name not in expected]
    if foreign:
        return (
            f"checkpoint {folder} holds shards that it was written without, and would read them: remove "
            f"{', '.join(foreign)}"
        )
    return _wrong_name(folder)


def _wrong_name(folder: Path) -> str | None:
    """A sentence where a whole checkpoint is not of the step that its folder's name says."""
    named = re.fullmatch(r"global_step_(\d+)", folder.name)
    if named is None or not (folder / STATE_FILE).is_file():
        return None
    try:
        step = json.loads((folder / STATE_FILE).read_bytes())["global_step"]
    except (ValueError, LookupError, TypeError):
        return None
    if step == int(named[1]):
        return None
    return f"checkpoint {folder} is not of step {named[1]}: it was written as global_step_{step}; give it its name back"


def promised_parts(folder: Path) -> set[str]:
    """The parts (`actor`, `critic`) that a whole checkpoint was written with; one that is gone now included."""
    return {Path(name).parts[0] for name in read_checksums(folder / CHECKSUMS)} & PARTS.keys()


def _shards(folder: Path, part: str) -> list[str]:
    """Every file that is read as a shard of a part, by its name in the checkpoint."""
    files = (file for name in (MODEL_FOLDER, OPTIM_FOLDER) for file in (folder / part / name).glob("*.safetensors"))
    return sorted(str(file.relative_to(folder)) for file in files)


def mark_only_as_best(folder: str | Path) -> None:
    """Say of a checkpoint being written that it is one only for being the best so far."""
    (Path(folder) / ONLY_AS_BEST).write_text("Saved for being the best so far; removed after a better one is saved.\n")


def checkpoints_in(root: str | Path) -> list[Path]:
    """All `global_step_N` folders, by step."""
    folders = Path(root).glob("global_step_*")
    return sorted((f for f in folders if re.fullmatch(r"global_step_\d+", f.name) and f.is_dir()), key=step_of)


def _checkpoints(root: str | Path, newest: int) -> list[Path]:
    """Those up to step `newest`, by step. Later ones stem from an earlier run in the same folder and are left alone."""
    return [folder for folder in checkpoints_in(root) if step_of(folder) <= newest]


def not_to_be_kept(root: str | Path, part: str, keep: int | None, newest: int) -> list[Path]:
    """Where `part` (`actor` or `critic`) is, or was, in all but the last `keep` checkpoints up to step `newest`; None
    keeps all.

    The one that `best` names stays; one that is there only for being the best is not counted among the last.
    """
    if keep is None:
        return []
    regular = [folder for folder in _checkpoints(root, newest) if not (folder / ONLY_AS_BEST).exists()]
    return [folder / part for folder in regular[:-keep] if step_of(folder) != best_step(root)]


def prune_checkpoints(root: str | Path, part: str, keep: int | None, newest: int) -> list[str]:
    """Remove what is `not_to_be_kept` of `part`; returns what went, as `global_step_N/part`, and `global_step_N` where
    that was the last of it."""
    gone = []
    for folder in not_to_be_kept(root, part, keep, newest):
        checkpoint = folder.parent
        if folder.is_dir():
            _remove(folder)
            gone.append(f"{checkpoint.name}/{part}")
        for name in PARTS[part]:
            (checkpoint / name).unlink(missing_ok=True)
        if not any(child.is_dir() for child in checkpoint.iterdir()):
            _remove(checkpoint)
            gone.append(checkpoint.name)
    return gone


def remove_former_bests(root: str | Path, newest: int) -> None:
    """Remove the checkpoints up to step `newest` that were there only for being the best, unless `best` names them."""
    for folder in _checkpoints(root, newest):
        if (folder / ONLY_AS_BEST).exists() and step_of(folder) != best_step(root):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder whose name goes first: what a crash leaves of it is then not taken for a damaged one."""
    shutil.rmtree(folder.rename(folder.with_name(folder.name + PRUNED)))
