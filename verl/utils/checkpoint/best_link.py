"""`best`, beside the checkpoints: a relative link to the `global_step_N` that validated best.

A link takes no room, changes in one piece and goes along when the run's folder is moved. What reads through it may
find it changed half-way, so readers go by the name behind it (`behind_best`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from verl.utils.checkpoint.checksums import sync_to_disk

BEST = "best"


def best_step(root: str | Path) -> int | None:
    """The step that `best` names; None where there is no such link."""
    link = Path(root) / BEST
    match = re.fullmatch(r"global_step_(\d+)", os.readlink(link)) if link.is_symlink() else None
    return None if match is None else int(match[1])


def point_best(root: str | Path, step: int) -> None:
    """Let `best` name `global_step_N`; at every moment it names the one or the other."""
    temporary = Path(root) / f"{BEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"global_step_{step}", target_is_directory=True)
    os.replace(temporary, Path(root) / BEST)
    sync_to_disk(Path(root))


def try_best_link(root: str | Path) -> None:
    """Find out before any work whether `point_best` will do.

    Raises:
        OSError: something else is in the link's place, or the file system knows no links.
    """
    root = Path(root)
    link, temporary = root / BEST, root / f"{BEST}.tmp"
    if os.path.lexists(link) and best_step(root) is None:
        raise FileExistsError(
            f"{link} is not a link that this trainer made, and trainer.best_metric needs its place: move it away"
        )
    root.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(".", target_is_directory=True)
    except OSError as error:
        raise OSError(
            f"{root} takes no symbolic links ({error}), which trainer.best_metric needs for {link}: "
            "put trainer.default_local_dir elsewhere, or set trainer.best_metric=null"
        ) from error
    temporary.unlink()


def behind_best(path: str | Path) -> Path:
    """The path with the checkpoint that it names now in the place of such a link; any other path as it is."""
    path = Path(path)
    for part in (path, *path.parents):
        if part.name == BEST and best_step(part.parent) is not None:
            return part.parent / os.readlink(part) / path.relative_to(part)
    return path
