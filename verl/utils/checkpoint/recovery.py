"""Where a run goes on, in a folder that a crash or a failing disk has been at.

`clear_up` finishes or undoes what a crash cut short; only the run that holds the folder may call it. `newest_whole`
says which checkpoint to resume from: the one that the tracker names, which was written last, or, where that is damaged,
the newest whole one before it. A damaged one is set aside as `global_step_N.damaged`, so that whoever resumes next does
not meet it, and is never deleted.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from verl.utils.checkpoint.checkpoint_manager import (
    NAMING,
    PRUNED,
    announcement,
    checkpoints_in,
    damage_of,
    follow_announcement,
    get_checkpoint_tracker_filename,
    promised_parts,
    step_of,
    track,
    tracked_step,
    ways_out,
)
from verl.utils.checkpoint.checksums import sync_to_disk

logger = logging.getLogger(__name__)

# Whole checkpoints that a refusal names.
NAMED = 3


# ---------------------------------------------------------------------------------------------------------------------
# After a crash


def clear_up(root: Path) -> None:
    """Finish a checkpoint that only the tracker does not name yet, give back its name to one that was being replaced,
    and remove what is half written or half removed."""
    _finish_publishing(root)
    for replaced in sorted(root.glob("global_step_*.old")):
        # A file or a link of that name is none of a run's making.
        if replaced.is_dir() and not replaced.is_symlink():
            _settle_replaced(replaced)
    for left in (*root.glob("global_step_*"), *root.glob(f"global_step_*/*{PRUNED}")):
        leftover = re.fullmatch(rf"global_step_\d+(\.tmp|{PRUNED})", left.name) or left.suffix == PRUNED
        if leftover and left.is_dir() and not left.is_symlink():
            logger.info("removing %s, which a run that ended left %s", left, _half(left))
            shutil.rmtree(left)


def _half(left: Path) -> str:
    return "half removed" if left.suffix == PRUNED else "half written"


def _finish_publishing(root: Path) -> None:
    """A sealed checkpoint that has its name is the newest, though a crash came before the tracker."""
    announced = announcement(root)
    if not announced.is_file():
        return
    text = announced.read_bytes().decode(errors="replace")
    final = root / f"global_step_{text}"
    if re.fullmatch(r"[0-9]+", text) and final.is_dir() and not final.with_suffix(".tmp").exists():
        follow_announcement(root)
        logger.info("%s was complete when the run that wrote it ended: it is the newest", final)
    else:
        announced.unlink()


def _settle_replaced(replaced: Path) -> None:
    """Of two checkpoints of one step, the later one stays if it is there and whole."""
    final = replaced.with_suffix("")
    if final.exists():
        cause = _damage_of(final)
        if cause is None:
            logger.info("removing %s, which %s has replaced", replaced, final.name)
            shutil.rmtree(replaced)
            return
        set_aside(final, cause)
    replaced.rename(final)
    sync_to_disk(final.parent)
    logger.warning("%s is %s again: a run ended while it replaced it", replaced, final.name)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint


def newest_whole(root: Path, parts: Collection[str]) -> Path | None:
    """The checkpoint to resume from, with these parts (`actor`, `critic`); None where there are no checkpoints.

    A newest one that was written without one of them is another stage's, and returned as it is.

    Raises:
        FileNotFoundError: there are checkpoints, and no tracker says which is the newest, or it names none of them.
        ValueError: the tracker is damaged, or no checkpoint is whole.
    """
    folders, step = checkpoints_in(root), tracked_step(root)
    tracker = get_checkpoint_tracker_filename(root)
    if step is None:
        if folders:
            named = ", ".join(folder.name for folder in folders)
            raise FileNotFoundError(
                f"{root} holds {named}, and {tracker}, which says which of them was written last, is missing: "
                f"{ways_out(root)}"
            )
        return None
    candidates = [folder for folder in reversed(folders) if step_of(folder) <= step]
    if not candidates:
        raise FileNotFoundError(
            f"{tracker} names step {step}, but {root / f'global_step_{step}'} does not exist: restore it, or "
            f"{ways_out(root)}"
        )
    chosen, damaged = _first_whole(candidates, step, parts)
    if chosen is None:
        causes = "; ".join(damaged.values())
        raise ValueError(
            f"no checkpoint in {root} is whole: {causes}. Copy one again, or begin afresh with "
            "trainer.resume_mode=disable"
        )
    for folder, cause in damaged.items():
        set_aside(folder, cause)
    _say_why(chosen, step, folders)
    if damaged:
        track(root, step_of(chosen))
    return chosen


def _first_whole(candidates: list[Path], tracked: int, parts: Collection[str]) -> tuple[Path | None, dict[Path, str]]:
    """The first of these that is whole and has the parts, and what is wrong with the damaged ones before it."""
    damaged = {}
    for folder in candidates:
        cause = _damage_of(folder)
        lacking = [part for part in parts if not (folder / part).is_dir()]
        if cause is None and lacking and step_of(folder) != tracked:
            logger.info("passing over %s: it has no %s any more", folder, lacking[0])
            continue
        if cause is None and promised_parts(folder).intersection(lacking):
            cause = f"checkpoint {folder} is damaged: its {lacking[0]} is gone"
        if cause is None:
            return folder, damaged
        damaged[folder] = cause
    return None, damaged


def _say_why(chosen: Path, tracked: int, folders: list[Path]) -> None:
    step, tracker = step_of(chosen), Path(get_checkpoint_tracker_filename(chosen.parent)).name
    later = [folder.name for folder in folders if step_of(folder) > tracked]
    if step != tracked:
        logger.warning(
            "%s names step %d, which cannot be taken: going on from %s, the newest whole checkpoint before it",
            tracker, tracked, chosen,
        )  # fmt: skip
    if later:
        logger.warning(
            "going on from %s, not from %s: %s names step %d, which was written last. To go on from a later step, name "
            "its folder with %s", chosen.name, ", ".join(later), tracker, tracked, NAMING,
        )  # fmt: skip


def refuse_damaged(folder: Path) -> None:
    """Look at the checkpoint that a run was told to resume from.

    Raises:
        ValueError: it is damaged; names whole ones beside it.
    """
    step_of(folder)
    cause = _damage_of(folder)
    if cause is None:
        return
    whole = []
    for other in reversed(checkpoints_in(folder.parent)):
        if other != folder and len(whole) < NAMED and _damage_of(other) is None:
            whole.append(other.name)
    beside = f"whole beside it: {', '.join(whole)}" if whole else "none beside it is whole"
    raise ValueError(f"{cause} ({beside})")


def _damage_of(folder: Path) -> str | None:
    """`damage_of`, for which a place that the disk cannot read is damage. Any other OSError says nothing about the
    checkpoint, and is raised."""
    try:
        return damage_of(folder)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"checkpoint {folder} cannot be read: {error}"


def set_aside(folder: Path, cause: str) -> None:
    """Rename a damaged checkpoint so that it is no checkpoint any more; what is left of it may still be of use."""
    place, number = folder.with_suffix(".damaged"), 1
    while place.exists():
        number += 1
        place = folder.with_suffix(f".damaged-{number}")
    folder.rename(place)
    sync_to_disk(folder.parent)
    logger.warning("%s; it is set aside as %s", cause, place)
