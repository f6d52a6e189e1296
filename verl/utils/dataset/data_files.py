"""Whether the files of a run's data are there; nothing is read of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def find_files(data_files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files, `~` expanded. FileNotFoundError or ValueError says which one cannot be read."""
    names = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    if not names:
        raise ValueError("no data file is given")
    paths = [Path(os.path.expanduser(name)) for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        several = any(re.search("[,\uff0c]", name) for name in missing)
        raise FileNotFoundError(
            f"no such data file (looked in {Path.cwd()} for relative paths): {', '.join(missing)}"
            + ("; several files are written as a list, [a.parquet,b.parquet]" if several else "")
        )
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder and not a data file{_readable_in(path)}")
        if not path.is_file():
            raise ValueError(f"{path} is no file that can be read twice: write the rows into one")
    return paths


def _readable_in(folder: Path) -> str:
    from verl.utils.dataset.arrow_rows import READABLE

    inside = sorted(file.name for file in folder.iterdir() if file.suffix in READABLE)
    if inside:
        return f": name files in it, {folder / inside[0]} for one"
    return f", without {' or '.join(READABLE)} files"
