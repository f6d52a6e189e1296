"""Rows of whatever a user has: files of several kinds, folders, datasets of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.data_tools.convert.json_files import Record, read_json_text
from verl.data_tools.convert.tables import read_csv_text, read_xlsx
from verl.data_tools.convert.text_files import read_text
from verl.data_tools.reading import read_arrow, saved_files, saved_splits
from verl.utils.dataset.arrow_rows import stream_records

# By the ending of a file's name, without .gz.
JSON, TABLES, EXCEL, PARQUET = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".xlsx", ".xlsm"), (".parquet",)
SUFFIXES = (*JSON, *TABLES, *EXCEL, *PARQUET)
SAVED = "Hugging Face folder"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Reading:
    """What is asked for of a source; None is what the source says itself.

    encoding: of text files.
    delimiter: of CSV files.
    sheet: of Excel files.
    split, subset: of Hugging Face datasets and folders.
    """

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
    split: str | None = None
    subset: str | None = None


@dataclass
class Source:
    """Rows of one file or dataset, in order.

    name: for messages.
    kind: what it is, in words.
    records: a record for each row, or why there is none.
    notes: what else is to be said of it.
    text_cells: all its values are text.
    """

    name: str
    kind: str
    records: list[Record]
    notes: list[str] = field(default_factory=list)
    text_cells: bool = False

    def place(self, row: int) -> str:
        """The source and a row of it, from 0, for messages."""
        return f"{self.name}, row {row}"


def read_sources(name: str, reading: Reading) -> list[Source]:
    """The rows of a file, of a folder's files, or of a dataset by its folder or name.

    Raises:
        FileNotFoundError, ValueError: there is no such thing, or it is damaged as a whole.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [_checked(_read_file(path, reading))]
    if path.is_dir():
        saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
        found = [_read_saved(path, reading)] if saved else _read_folder(path, reading)
        return [_checked(source) for source in found]
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in SUFFIXES or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no such file or folder, nor a dataset's name on the hub: {name}")
    return [_checked(_read_hub(name, reading))]


def _checked(source: Source) -> Source:
    if not source.records:
        raise ValueError(f"{source.name} has no rows")
    return source


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _read_file(path: Path, reading: Reading) -> Source:
    suffix = Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    if suffix in PARQUET and path.suffix != ".gz":
        return Source(str(path), "parquet", list(stream_records(path)))
    if suffix in EXCEL and path.suffix != ".gz":
        sheet, records = read_xlsx(path, reading.sheet)
        return Source(str(path), f"Excel, sheet {sheet!r}", records, text_cells=True)
    if suffix in JSON:
        text = read_text(path, reading.encoding)
        kind, records = read_json_text(text.text, str(path), lines=suffix != ".json")
        return Source(str(path), f"{kind}{_in(text.encoding)}", records)
    # Excel calls its "Unicode text", with tabs, .txt.
    if suffix in (*TABLES, ".txt"):
        text = read_text(path, reading.encoding)
        delimiter, records = read_csv_text(text.text, str(path), reading.delimiter)
        return Source(str(path), f"CSV with {delimiter!r}{_in(text.encoding)}", records, text_cells=True)
    hint = "; save it as .xlsx" if suffix in (".xls", ".ods", ".xlsb") else ""
    raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)} (or .gz after text), got this{hint}")


def _in(encoding: str) -> str:
    return "" if encoding in ("utf-8", "utf-8-sig") else f", {encoding}"


def _read_folder(path: Path, reading: Reading) -> list[Source]:
    """The data files of a folder, those of one split if their names speak of splits."""
    files = [
        file
        for file in sorted(path.rglob("*"))
        if (Path(file.stem).suffix if file.suffix == ".gz" else file.suffix).lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
    ]
    if not files:
        raise ValueError(f"{path} has no data files: expected some that end in {', '.join(SUFFIXES)}")
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    there = sorted({split for split in splits.values() if split})
    if reading.split is None and (len(there) <= 1 or "train" not in there):
        wanted = None
        if len(there) > 1:
            raise ValueError(f"{path}: expected the files of one split, got {', '.join(there)}; name one with --split")
    else:
        wanted = reading.split or "train"
        if wanted not in there:
            raise ValueError(f"{path} has no files of a split {wanted!r}, only of {', '.join(there) or 'none'}")
    chosen = [file for file in files if wanted is None or splits[file] == wanted]
    sources = [_read_file(file, reading) for file in chosen]
    if len(chosen) < len(files):
        others = ", ".join(split for split in there if split != wanted)
        left = len(files) - len(chosen)
        sources[0].notes.append(f"of {path}, the files of the split {wanted!r}; {left} others are not read ({others})")
    return sources


def _split_of(file: Path) -> str | None:
    """The split that a file's name or folder has as a word, as `datasets` looks for it."""
    words = re.split(r"[^a-z]+", "/".join(file.parts).lower())
    return next((split for split in _SPLITS if split in words), None)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets


def _read_saved(path: Path, reading: Reading) -> Source:
    """What `save_to_disk` wrote."""
    splits = saved_splits(path)
    if not splits:
        return Source(str(path), SAVED, _saved_rows(path))
    wanted, notes = _choose(str(path), splits, reading)
    return Source(str(path), f"{SAVED}, split {wanted!r}", _saved_rows(path / wanted), notes)


def _saved_rows(folder: Path) -> list[Record]:
    return [record for file in saved_files(folder) for record in read_arrow(file)]


def _read_hub(name: str, reading: Reading) -> Source:
    """The rows of one split, as they are stored: pictures and sound are not decoded."""
    datasets = _library(name)
    with _as_sentences(name):
        found = datasets.load_dataset(name, reading.subset)
    wanted, notes = _choose(name, list(found), reading)
    rows = found[wanted].with_format("arrow")[:].to_pylist()
    return Source(name, f"Hugging Face dataset, split {wanted!r}", rows, notes)


def _choose(name: str, splits: Sequence[str], reading: Reading) -> tuple[str, list[str]]:
    """The split to read, and that there are others."""
    wanted = reading.split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
    if wanted is None or wanted not in splits:
        got = f"expected a split {wanted!r}, got" if wanted else "expected one split, got"
        raise ValueError(f"{name}: {got} {', '.join(splits)}; name one with --split")
    others = [split for split in splits if split != wanted]
    return wanted, [f"its other splits are not read: {', '.join(others)}"] if others else []


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: Hugging Face datasets need `datasets`: pip install -e '.[data]'") from error
    return datasets


@contextmanager
def _as_sentences(name: str) -> Iterator[None]:
    """A ValueError for whatever the library raises: its kinds are many, and httpx's and pyarrow's come through."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        hint = (
            "it is no file here, and as a name on the hub it needs the network (or the cache, with HF_HUB_OFFLINE=1), "
            "a login for private ones, and --subset where it has several"
        )
        raise ValueError(f"{name} cannot be read as a dataset: {hint} ({type(error).__name__}: {said:.300})") from error
