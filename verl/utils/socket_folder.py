"""Where Ray keeps its sockets, whose paths may not be long."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

# A socket's path may have 107 bytes on Linux. Below its folder Ray takes 64 for a session and its longest socket:
# /session_2026-01-31_23-59-59_999999_9999999/sockets/plasma_store
LONGEST_FOLDER = 107 - 64
SHORT_FOLDER = "/tmp/ray"


def session_folder() -> str | None:
    """The folder of Ray's sockets; None leaves it to Ray, whose choice is `ray` under RAY_TMPDIR, TMPDIR or /tmp.

    Raises:
        ValueError: both that and `SHORT_FOLDER` cannot be used.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    own = os.path.join(os.environ.get(name) or "/tmp", "ray")
    length = len(os.fsencode(own))
    if length <= LONGEST_FOLDER:
        return None
    what = f"{name}: expected a folder that Ray's sockets fit under, of at most {LONGEST_FOLDER} bytes with /ray, got "
    what += f"{own}, which has {length}"
    if not _writable(SHORT_FOLDER):
        raise ValueError(f"{what}, and {SHORT_FOLDER} cannot be written either; set RAY_TMPDIR to a short folder")
    logger.warning("%s: Ray's session goes to %s", what, SHORT_FOLDER)
    return SHORT_FOLDER


def _writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
