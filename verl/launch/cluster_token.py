"""The cluster's token, which every node has to have: whoever has it may run code there."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

FILE = ".verl_cluster_token"
SHORTEST = 32
LOOK_S = 0.5


class TokenFault(ValueError):
    """A token that cannot be used, or none."""


def take(file: Path, wait_s: float, still: Callable[[], None]) -> Path | None:
    """Give this process and its children the token: RAY_AUTH_TOKEN, or what RAY_AUTH_TOKEN_PATH or else `file` holds.

    Args:
        wait_s: seconds that a file is waited for; 0: this is the head, which makes the file that is not there.
        still: called now and then while it is waited for.

    Returns the file if it was made here, for `remove`.

    Raises:
        TokenFault: it is too short, others may read it, or the file did not come.
    """
    made = None
    source, token = "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named or file).expanduser().absolute()
        if not wait_s and not named and not path.exists():
            made = _make(path)
        source, token = str(path), _read(path, wait_s, still)
    if len(token) < SHORTEST:
        raise TokenFault(f"{source}: expected a token of {SHORTEST} characters or more, got {len(token)}")
    # Ray reads it from here, and so do the trainer and all ranks.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    return made


def remove(made: Path | None) -> None:
    """Take back what `take` has made."""
    if made is not None:
        made.unlink(missing_ok=True)


def _make(path: Path) -> Path | None:
    """A new file that its owner alone can read, whole from the moment that it is there; None if another was faster."""
    own = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as opened:
            opened.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(own, path)
            return path
    except OSError as error:
        raise TokenFault(
            f"{path} cannot be written ({error.strerror}): set RAY_AUTH_TOKEN to the same token on all nodes, or name "
            "another --token_file"
        ) from error
    finally:
        own.unlink(missing_ok=True)
    return None


def _read(path: Path, wait_s: float, still: Callable[[], None]) -> str:
    deadline = time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() >= deadline:
            raise TokenFault(
                f"{path} is not there: start the head, whose --token_file has to be this one on storage that all nodes "
                "see, or set RAY_AUTH_TOKEN to the same token on all nodes"
            )
        still()
        time.sleep(LOOK_S)
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise TokenFault(f"{path} can be read by others, who could run code here: chmod 600 {path}")
        return path.read_text().strip()
    except OSError as error:
        raise TokenFault(f"{path} cannot be read ({error.strerror}): start all nodes as the same user") from error
