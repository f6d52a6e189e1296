"""Is another package named verl installed beside this one, whose files would lie over these?

Upstream's distribution has the same name. pip replaces one by the other in one place; it does not where they came by
other ways (`--target`, a system's packages, a user's site). Imports nothing of this package, which may be the other's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# What the summary of our own distribution begins with (setup.py).
OURS = "Black-box distillation"
_METADATA = re.compile(r"verl(-[^-]+)?(-py[\d.]+)?\.(dist|egg)-info")


def others(path: Sequence[str], home: Path) -> Iterator[tuple[str, str]]:
    """Version and folder of each other distribution in the entries of a module path, up to the one that `home`, where
    this package lies, is."""
    for entry in path:
        folder = Path(entry or os.curdir)
        names = []
        with suppress(OSError):
            names = [name for name in os.listdir(folder) if name.startswith("verl") and _METADATA.fullmatch(name)]
        for name in names:
            headers = _headers(folder / name)
            if not headers.get("Summary", "").startswith(OURS):
                yield headers.get("Version", "of unknown version"), str(folder)
        if folder.resolve() == home.resolve():
            return


def _headers(info: Path) -> dict[str, str]:
    """The headers of a distribution's metadata; empty where it has none."""
    for file in (info / "METADATA", info / "PKG-INFO", info):
        with suppress(OSError):
            head = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
            return dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    return {}


def warn_of_another_verl() -> None:
    """Say on standard error that there is one, and what to do."""
    home, own = Path(__file__).parents[2], Path("verl", "__init__.py")
    # Ray's workers, and `python -m`, look for modules where they are started before all else.
    if own.exists() and not own.samefile(home / own):
        print(
            f"verl: {Path.cwd()} has a package verl of its own, which processes started here would take for the one in "
            f"{home}: call it from another folder",
            file=sys.stderr,
        )
    for version, folder in others(sys.path, home):
        print(
            f"verl: another package of this name, verl {version}, is installed in {folder}, and Python may mix its "
            "files with these: run `pip uninstall verl` until pip finds none, then install this one again",
            file=sys.stderr,
        )
