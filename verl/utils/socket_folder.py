"""Where Ray keeps its sockets, whose paths may not be long, its logs, and what does not fit into memory."""

from __future__ import annotations

import logging
import os
import shutil

logger = logging.getLogger(__name__)

# A socket's path may have 107 bytes on Linux. Below its folder Ray takes 64 for a session and its longest socket:
# /session_2026-01-31_23-59-59_999999_9999999/sockets/plasma_store
LONGEST_FOLDER = 107 - 64
SHORT_FOLDER = "/tmp/ray"
# Ray's processes write a few files before they answer, and without them are waited for in vain.
LEAST_FREE = 16 * 2**20


def session_folder() -> str | None:
    """The folder of Ray's sockets; None leaves it to Ray, whose choice is `ray` under RAY_TMPDIR, TMPDIR or /tmp.

    Raises:
        ValueError: that is too long, and `SHORT_FOLDER` cannot be used either.
        OSError: it cannot be written, or its disk is full.
    """
    too_long = check_session_folder()
    if too_long is None:
        return None
    logger.warning("%s: Ray's session goes to %s", too_long, SHORT_FOLDER)
    return SHORT_FOLDER


def check_session_folder() -> str | None:
    """The errors of `session_folder`; why Ray's own choice is too long, if it is."""
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    own = os.path.join(os.environ.get(name) or "/tmp", "ray")
    length = len(os.fsencode(own))
    if length <= LONGEST_FOLDER:
        _check(own, name)
        return None
    what = f"{name}: expected a folder that Ray's sockets fit under, of at most {LONGEST_FOLDER} bytes with /ray, got "
    what += f"{own}, which has {length}"
    if not _writable(SHORT_FOLDER):
        raise ValueError(f"{what}, and {SHORT_FOLDER} cannot be written either; set RAY_TMPDIR to a short folder")
    _check(SHORT_FOLDER, "RAY_TMPDIR")
    return what


def _check(folder: str, name: str) -> None:
    if not _writable(folder):
        raise OSError(f"{name}: {folder}, where Ray keeps its sockets, cannot be written: set RAY_TMPDIR to another")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise OSError(
            f"{name}: the disk of {folder}, where Ray keeps its sockets and logs, is full: {free / 2**20:.2f} MiB are "
            f"free, expected {LEAST_FREE >> 20}: make room, or set RAY_TMPDIR to a folder on another disk"
        )


def _writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
