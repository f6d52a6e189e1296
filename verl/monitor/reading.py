"""Runs from files: our own and upstream verl's metrics.jsonl and console logs, TensorBoard folders, JSONL, CSV, exports
of W&B, and the trainer_state.json of Hugging Face's trainers."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from verl.monitor.series import Run, as_number
from verl.utils.step_line import read_line

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


STEP_LINE = re.compile(r"\bstep:(\d+) - (.*)")
NUMPY = re.compile(r"^np\.\w+\((.*)\)$")


class NotARun(ValueError):
    """A path that holds no run, with what was expected, what is there, and what to pass."""


def read_run(path: str | Path, settings: str | Path | None = None, only: Container[str] | None = None) -> Run:
    """The run in a folder or a file; its settings from that file, else from `settings.json` beside the metrics. Of its
    metrics, those in `only`; None: all.

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
    if only is not None:
        rows = ((step, {metric: value for metric, value in data.items() if metric in only}) for step, data in rows)
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
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".log": _log, ".txt": _log}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(readers)
        raise NotARun(f"{file}: expected a name in {known}, got {file.suffix or 'none'}; rename or export it")
    try:
        yield from reader(file)
    except UnicodeDecodeError as error:
        raise NotARun(f"{file}: expected UTF-8, got {error.reason} at byte {error.start}; save it as UTF-8") from error


def _json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A line per step: {"step": N, "data": {...}}, or flat. A last line that is cut short does not count."""
    return _rows(_parsed_lines(file), file)


def _parsed_lines(file: Path) -> Iterator[Any]:
    fault, good = None, 0
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if fault is not None:
                break
            try:
                yield json.loads(line)
                good += 1
            except ValueError:
                fault = f"{file}: expected a JSON object a line, got {line[:60].strip()!r} in line {number}"
        else:
            if good:
                return
    if fault is not None:
        raise NotARun(fault)


def _json(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A list of rows, a table of columns ({name: {row: value}} or {name: [values]}), or either under a name that tools
    give it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise NotARun(f"{file}: expected JSON, got {error}; lines of JSON want the name .jsonl") from error
    if isinstance(content, dict):
        inner = next((content[name] for name in ("history", "log_history") if name in content), content)
        content = _rows_of_columns(inner) if isinstance(inner, dict) else inner
    if not isinstance(content, list):
        raise NotARun(f"{file}: expected a list of rows or a table of columns, got {type(content).__name__}")
    return _rows(content, file)


def _rows_of_columns(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {
        name: dict(enumerate(column)) if isinstance(column, list) else column
        for name, column in table.items()
        if isinstance(column, list | dict)
    }
    places = dict.fromkeys(place for column in columns.values() for place in column)
    return [{name: column[place] for name, column in columns.items() if place in column} for place in places]


def _log(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The console's lines, ours and upstream verl's: `step:N - NAME:VALUE - ...`, with anything before and between."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = STEP_LINE.search(line)
            if found is not None:
                parts = (part.rpartition(":") for part in found[2].split(" - "))
                yield int(found[1]), {name.strip(): NUMPY.sub(r"\1", value.strip()) for name, _, value in parts}
            elif (own := read_line(line)) is not None:
                yield own


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


def _rows(rows: Iterable[Any], file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their steps: those without one are left out, or, where none has one, counted."""
    any_step = False
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise NotARun(f"{file}: expected rows of metrics by name, got {str(row)[:60]!r}")
        name = next((name for name in STEP_NAMES if name in row), None)
        any_step = any_step or name is not None
        if name is None and any_step:
            continue
        step = number if name is None else as_number(row[name])
        if step is not None and abs(step) < 2**53:
            nested = row.get("data")
            yield int(step), nested if isinstance(nested, dict) else {n: v for n, v in row.items() if n != name}
