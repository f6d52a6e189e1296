"""Whole checkpoints: `global_step_N` folders under a run's folder, complete or absent.

A checkpoint is written to `global_step_N.tmp`, checksummed and renamed; the tracker file, which names the newest
one, changes last. What a crash leaves behind is a `.tmp` folder that nothing reads. Where a step replaces an earlier
checkpoint of the same step, a crash between the two renames leaves the earlier one as `global_step_N.old`, whole.
Resuming then says that `global_step_N` is gone, and either folder can be renamed to it.

A checkpoint may be there only for being the best (`ONLY_AS_BEST` in it): it goes when it no longer is.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from verl.utils.checkpoint.best_link import behind_best, best_step
from verl.utils.checkpoint.checksums import CHECKSUMS, checksums_of, read_checksums, sync_to_disk, write_checksums
from verl.utils.checkpoint.sharded import MODEL_FOLDER, OPTIM_FOLDER

ONLY_AS_BEST = "only_as_best.txt"
# What a run with a discriminator keeps beside the models; of no use without it.
REPLAY_FILE, HELD_OUT_FILE = "replay.safetensors", "held_out.safetensors"
# What SODA keeps beside the actor.
REJECTED_FILE = "rejected.safetensors"
# The parts that can be pruned, each with the files that go with it.
PARTS = {"actor": (REJECTED_FILE,), "critic": (REPLAY_FILE, HELD_OUT_FILE)}


def get_checkpoint_tracker_filename(root_path: str | Path) -> str:
    """The file that holds the newest checkpoint's step."""
    return str(Path(root_path) / "latest_checkpointed_iteration.txt")


def find_latest_ckpt_path(path: str | Path | None, directory_format: str = "global_step_{}") -> str | None:
    """The newest complete checkpoint under `path`, or None if there is none.

    Raises:
        FileNotFoundError: the tracker file names a checkpoint that is gone.
    """
    if path is None or not Path(get_checkpoint_tracker_filename(path)).is_file():
        return None
    step = Path(get_checkpoint_tracker_filename(path)).read_text().strip()
    folder = Path(path) / directory_format.format(step)
    # A number and nothing else: a path in its place would lead elsewhere.
    if re.fullmatch(r"[0-9]+", step) is None or not folder.is_dir():
        raise FileNotFoundError(
            f"{get_checkpoint_tracker_filename(path)} names step {step}, but {folder} does not exist: "
            "restore it, write an existing step into that file, or set trainer.resume_mode=disable"
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
    """An empty folder for writing step `step`; remains of an earlier attempt are removed."""
    folder = Path(root) / f"global_step_{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal_checkpoint(temporary: Path, parts: Sequence[str] = ()) -> None:
    """Checksum what was written and have the disk take it. Each of `parts` (`actor`, `critic`) gets its own checksums
    beside the whole folder's, so that it can be checked where it was copied alone."""
    names = [str(file.relative_to(temporary)) for file in _files(temporary)]
    sums = checksums_of(temporary, names, sync=True, shown=False)
    for part in parts:
        own = {name.removeprefix(f"{part}/"): value for name, value in sums.items() if name.startswith(f"{part}/")}
        write_checksums(temporary / part / CHECKSUMS, own)
    write_checksums(temporary / CHECKSUMS, sums)
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync_to_disk(folder)


def publish_checkpoint(temporary: Path) -> Path:
    """Give a sealed folder its name, and make it the newest checkpoint."""
    final = temporary.with_suffix("")
    replaced = temporary.with_suffix(".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    tracker = Path(get_checkpoint_tracker_filename(final.parent))
    replacement = tracker.with_suffix(".tmp")
    replacement.write_text(str(step_of(final)))
    sync_to_disk(replacement)
    os.replace(replacement, tracker)
    sync_to_disk(tracker.parent)
    return final


def commit_checkpoint(temporary: Path) -> Path:
    """Seal what was written and publish it."""
    seal_checkpoint(temporary)
    return publish_checkpoint(temporary)


def verify_checkpoint(folder: str | Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        ValueError: names the files that are missing or damaged.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        raise FileNotFoundError(
            f"{folder / CHECKSUMS} is missing, and nothing else tells whether the checkpoint is whole: copy it again, "
            "or resume from another one with trainer.resume_mode=resume_path trainer.resume_from_path=..."
        )
    expected = read_checksums(folder / CHECKSUMS)
    # A whole part may have been pruned; whoever needs it will say that it is missing.
    pruned = {name for part, files in PARTS.items() if not (folder / part).exists() for name in (part, *files)}
    present = {name: value for name, value in expected.items() if Path(name).parts[0] not in pruned}
    there = [name for name in present if (folder / name).is_file()]
    found = checksums_of(folder, there)
    damaged = [name for name, value in present.items() if found.get(name) != value]
    if damaged:
        raise ValueError(
            f"checkpoint {folder} is damaged: {', '.join(damaged)} missing or changed since it was written; "
            "resume from an older one with trainer.resume_mode=resume_path trainer.resume_from_path=..."
        )
    foreign = [name for part in PARTS for name in _shards(folder, part) if name not in expected]
    if foreign:
        raise ValueError(
            f"checkpoint {folder} holds shards that it was written without, and would read them: remove "
            f"{', '.join(foreign)}"
        )


def _shards(folder: Path, part: str) -> list[str]:
    """Every file that is read as a shard of a part, by its name in the checkpoint."""
    files = (file for name in (MODEL_FOLDER, OPTIM_FOLDER) for file in (folder / part / name).glob("*.safetensors"))
    return sorted(str(file.relative_to(folder)) for file in files)


def mark_only_as_best(folder: str | Path) -> None:
    """Say of a checkpoint being written that it is one only for being the best so far."""
    (Path(folder) / ONLY_AS_BEST).write_text("Saved for being the best so far; removed after a better one is saved.\n")


def _checkpoints(root: str | Path, newest: int) -> list[Path]:
    """Those up to step `newest`, by step. Later ones stem from an earlier run in the same folder and are left alone."""
    folders = [folder for folder in Path(root).glob("global_step_*") if re.fullmatch(r"global_step_\d+", folder.name)]
    return sorted((folder for folder in folders if step_of(folder) <= newest), key=step_of)


def prune_checkpoints(root: str | Path, part: str, keep: int | None, newest: int) -> None:
    """Remove `part` (`actor` or `critic`) from all but the last `keep` checkpoints up to step `newest`; None keeps all.

    The one that `best` names stays; one that is there only for being the best is not counted among the last.
    """
    if keep is None:
        return
    regular = [folder for folder in _checkpoints(root, newest) if not (folder / ONLY_AS_BEST).exists()]
    for folder in regular[:-keep]:
        if step_of(folder) == best_step(root):
            continue
        shutil.rmtree(folder / part, ignore_errors=True)
        for name in PARTS[part]:
            (folder / name).unlink(missing_ok=True)
        if not any(child.is_dir() for child in folder.iterdir()):
            shutil.rmtree(folder)


def remove_former_bests(root: str | Path, newest: int) -> None:
    """Remove the checkpoints up to step `newest` that were there only for being the best, unless `best` names them."""
    for folder in _checkpoints(root, newest):
        if (folder / ONLY_AS_BEST).exists() and step_of(folder) != best_step(root):
            shutil.rmtree(folder)
