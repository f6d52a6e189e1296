"""Runs from files: our own and upstream verl's metrics.jsonl, TensorBoard folders, JSONL, CSV, and exports of W&B."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from verl.monitor.series import Run, as_number

METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"
EVENTS = "events.out.tfevents.*"
# The step's column, the first that is there; without one, rows count from 0.
STEP_NAMES = (
    "step",
    "_step",
    "Step",
    "global_step",
    "trainer/global_step",
    "training/global_step",
    "train/global_step",
)


class NotARun(ValueError):
    """A path that holds no run, with what was expected, what is there, and what to pass."""


def read_run(path: str | Path, settings: str | Path | None = None) -> Run:
    """The run in a folder or a file; its settings from that file, else from `settings.json` beside the metrics.

    Raises:
        NotARun: there is none, or several.
        OSError: a file cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotARun(f"{path}: expected a run's folder or a file of metrics, got nothing there; pass one that exists")
    folder = path if path.is_dir() else path.parent
    rows = _rows_of_folder(path) if path.is_dir() else _rows_of_file(path)
    file = Path(settings).expanduser() if settings is not None else folder / SETTINGS_FILE
    found = _settings(file, asked=settings is not None)
    name = path.resolve().name if path.is_dir() or path.name != METRICS_FILE else path.resolve().parent.name
    run = Run.of(name, rows, found)
    if not run.metrics:
        raise NotARun(
            f"{path}: expected metrics by step, got no number; pass a folder with {METRICS_FILE} or TensorBoard's "
            "files, or a .jsonl, .json or .csv file with a column of steps"
        )
    return run


def _settings(file: Path, asked: bool) -> Mapping[str, Any]:
    if not asked and not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML.
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if not asked:
            return {}
        raise NotARun(f"{file}: expected settings as YAML or JSON, got {' '.join(str(error).split())}") from error
    if isinstance(found, dict):
        return found
    if asked:
        raise NotARun(
            f"{file}: expected settings by name, got {type(found).__name__}; pass a YAML or JSON file of them"
        )
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _rows_of_folder(folder: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Those of metrics.jsonl if it is there, else TensorBoard's, in the folder itself or in the only one below."""
    if (folder / METRICS_FILE).is_file():
        return _rows_of_file(folder / METRICS_FILE)
    for place in (folder, folder / "tensorboard"):
        if any(place.glob(EVENTS)):
            return _rows_of_events(place)
    runs = sorted({found.parent for pattern in (METRICS_FILE, EVENTS) for found in folder.glob(f"*/**/{pattern}")})
    runs = [run for run in runs if run.name != "tensorboard" or run.parent not in runs]
    if len(runs) == 1:
        return _rows_of_folder(runs[0])
    if runs:
        raise NotARun(f"{folder}: expected one run, got {len(runs)}; pass one of {', '.join(map(str, runs[:10]))}")
    raise NotARun(
        f"{folder}: expected {METRICS_FILE} or TensorBoard's files, got neither; pass a run's folder "
        "(checkpoints/PROJECT/EXPERIMENT), or a .jsonl, .json or .csv file"
    )


def _rows_of_events(folder: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        for event in events.Scalars(tag):
            yield event.step, {tag: event.value}
    for tag in tags["tensors"]:  # TensorFlow's way to write scalars
        for event in events.Tensors(tag):
            number = event.tensor_proto
            if number.float_val and not number.tensor_shape.dim:
                yield event.step, {tag: number.float_val[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _rows_of_file(file: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if "tfevents" in file.name:
        raise NotARun(f"{file}: expected a folder for TensorBoard's files, got one of them; pass {file.parent}")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise NotARun(
            f"{file}: expected a name in {', '.join(readers)}, got {file.suffix or 'none'}; rename or export it"
        )
    try:
        return list(reader(file))
    except UnicodeDecodeError as error:
        raise NotARun(f"{file}: expected UTF-8, got {error.reason} at byte {error.start}; save it as UTF-8") from error


def _json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A line per step: {"step": N, "data": {...}}, or flat. A last line that is cut short does not count."""
    lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) > 1:
                break
            raise NotARun(f"{file}: expected a JSON object a line, got {line[:60]!r} in line {number}") from error
    return _rows(rows, file)


def _json(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A list of rows, a table of columns ({name: {row: value}} or {name: [values]}), or either under `history`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise NotARun(f"{file}: expected JSON, got {error}; lines of JSON want the name .jsonl") from error
    if isinstance(content, dict) and isinstance(content.get("history"), list | dict):
        content = content["history"]
    if isinstance(content, dict):
        columns = {
            name: dict(enumerate(column)) if isinstance(column, list) else column
            for name, column in content.items()
            if isinstance(column, list | dict)
        }
        places = dict.fromkeys(place for column in columns.values() for place in column)
        content = [
            {name: column[place] for name, column in columns.items() if column.get(place) is not None}
            for place in places
        ]
    if not isinstance(content, list):
        raise NotARun(f"{file}: expected a list of rows or a table of columns, got {type(content).__name__}")
    return _rows(content, file)


def _csv(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A row per step. In W&B's exports of charts a column is named `RUN - METRIC`, with two more for its extremes."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = [name for name in (rows[0] if rows else {}) if name]
    charts = {name for name in columns if " - " in name and not name.endswith(("__MIN", "__MAX"))}
    runs = sorted({name.rpartition(" - ")[0] for name in charts if f"{name}__MIN" in columns})
    if len(runs) > 1:
        raise NotARun(f"{file}: expected one run, got columns of {len(runs)} ({', '.join(runs[:5])}); export one alone")
    own = {}
    for name in columns:
        if runs and name.endswith(("__MIN", "__MAX")):
            continue
        own[name] = name.removeprefix(f"{runs[0]} - ") if runs else name
    return _rows([{own[name]: row[name] for name in own if row[name]} for row in rows], file)


def _rows(rows: list[Any], file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not all(isinstance(row, dict) for row in rows):
        wrong = next(row for row in rows if not isinstance(row, dict))
        raise NotARun(f"{file}: expected rows of metrics by name, got {str(wrong)[:60]!r}")
    names = {name for row in rows for name in row}
    step_name = next((name for name in STEP_NAMES if name in names), None)
    for number, row in enumerate(rows):
        step = number if step_name is None else as_number(row.get(step_name))
        if step is None or not abs(step) < 2**53:
            continue
        nested = row.get("data")
        yield int(step), nested if isinstance(nested, dict) else {n: v for n, v in row.items() if n != step_name}
