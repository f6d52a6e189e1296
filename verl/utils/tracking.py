"""The places that metrics go to: console, TensorBoard, a JSONL file, Weights & Biases.

A backend is a small class with `log`, `log_samples` and `close`; BACKENDS names them, and Tracking sends every step to
those that were asked for.

A resumed run goes on where the earlier one was logged, and the steps that it makes again count once. A run that starts
afresh in a used folder moves what is there aside. A backend that cannot write, on a full disk for instance, does not
end the run: it is said, and what can be kept for later is.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from verl.utils.console import printable, shorten
from verl.utils.stalls import waiting
from verl.utils.step_line import StepLines

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One validation answer next to the teacher's; plain tuples in this order do as well."""

    prompt: str
    answer: str
    teacher: str
    rouge: float


@dataclass(frozen=True)
class Run:
    """The facts about a run that a backend may need."""

    project: str
    experiment: str
    config: Mapping[str, Any]
    log_dir: Path
    tensorboard_dir: Path
    resumed: bool = True
    # Of what a resumed run logs; what an earlier one logged from there on is done again. None: nothing is.
    first_step: int | None = None
    total_steps: int | None = None


class Backend(Protocol):
    """A place for metrics. Constructed with the Run; `close` may be called more than once. What fails in writing is an
    OSError, after which the next call tries again."""

    def __init__(self, run: Run): ...

    def log(self, data: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, samples: Sequence[Sample], step: int) -> None: ...

    def close(self) -> None: ...


class ConsoleBackend:
    """The trainer's steps as one line each, at most one a second (`StepLines`); other metrics as
    `step:{n} - key:value - ...`; and the first validation samples, shortened."""

    shown_samples = 2
    shown_characters = 200

    def __init__(self, run: Run):
        self.lines = StepLines(run.total_steps if run else None)

    def log(self, data: Mapping[str, float], step: int) -> None:
        lines = self.lines.of(data, step)
        if lines is not None:
            return self._write_all(lines)
        values = [
            f"{name}:{value:.6g}" if isinstance(value, float) else f"{name}:{value}" for name, value in data.items()
        ]
        self._write(" - ".join([f"step:{step}", *values]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for sample in samples[: self.shown_samples]:
            texts = zip(("prompt", "answer", "teacher"), sample, strict=False)
            lines = [f"  {name}: {shorten(text, self.shown_characters)}" for name, text in texts]
            self._write("\n".join([f"step:{step} - sample with rouge-L {sample.rouge:.3f}", *lines]))

    def close(self) -> None:
        self._write_all(self.lines.held_back())

    def _write_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._write(line)

    def _write(self, text: str) -> None:
        tqdm.write(printable(text))  # print would run into a progress bar's line
        sys.stdout.flush()


class TensorBoardBackend:
    """TensorBoard event files in the run's `tensorboard_dir`, on disk after every step.

    A run that starts afresh where there are some moves them into a folder there, named by the time they were last
    written, which TensorBoard shows as a run of its own. A resumed run tells TensorBoard to forget the steps from its
    first one on.
    """

    def __init__(self, run: Run):
        self.folder = run.tensorboard_dir
        if not run.resumed:
            self._move_aside()
        self.purge_step = run.first_step if run.resumed else None
        # Steps that are not known to be on disk.
        self.pending: list[tuple[int, Callable[[], None]]] = []
        self._open()

    def _move_aside(self) -> None:
        files = sorted(self.folder.glob("events.out.tfevents.*"))
        if files:
            aside = self.folder / _time_of(max(files, key=lambda file: file.stat().st_mtime))
            aside.mkdir(exist_ok=True)
            for file in files:
                file.rename(aside / file.name)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

        self.writer = SummaryWriter(log_dir=str(self.folder), purge_step=self.purge_step)

    def log(self, data: Mapping[str, float], step: int) -> None:
        def add() -> None:
            for name, value in data.items():
                self.writer.add_scalar(name, value, step)

        self._write(add, step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self._write(lambda: self.writer.add_text("val/generations", samples_as_markdown(samples), step), step)

    def _write(self, add: Callable[[], None], step: int) -> None:
        self.pending.append((step, add))
        try:
            if self.writer is None:
                # Its writer does not survive a failure; of the first of these steps a part may be on disk.
                self.purge_step = min(step for step, _ in self.pending)
                self._open()
            for _, waiting in self.pending:
                waiting()
            self.writer.flush()
        except OSError:
            with suppress(OSError):
                self.close()
            self.writer = None
            raise
        self.pending.clear()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class FileBackend:
    """JSONL, one line per step: {"step": N, "data": {name: value}}, appended and on disk after every step.

    The file is VERL_FILE_LOGGER_PATH, else VERL_FILE_LOGGER_ROOT/project/experiment.jsonl, else log_dir/metrics.jsonl.
    JSON has no number for nan and the infinities, so they are the strings "nan", "inf" and "-inf"; Python's float()
    reads them. A resumed run appends: of two lines for one step, the later counts. A last line that a crash cut short
    is taken out first: its step is made again. A run that starts afresh where there is a file already moves it aside,
    to the same name with the time it was last written.
    """

    def __init__(self, run: Run):
        self.path = self._path(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is no file, as /dev/stdout, is only written to.
        if self.path.is_file():
            if run.resumed:
                _take_out_a_cut_line(self.path)
            else:
                self.path.rename(_free(self.path.with_suffix(f".{_time_of(self.path)}.jsonl")))
        # Without a buffer, so that what is on disk and what waits is known.
        self.file = self.path.open("ab", buffering=0)
        self.pending = b""

    @staticmethod
    def _path(run: Run) -> Path:
        if path := os.environ.get("VERL_FILE_LOGGER_PATH"):
            return Path(path).expanduser()
        if root := os.environ.get("VERL_FILE_LOGGER_ROOT"):
            return Path(root).expanduser() / run.project / f"{run.experiment}.jsonl"
        return run.log_dir / "metrics.jsonl"

    def log(self, data: Mapping[str, float], step: int) -> None:
        honest = {name: value if math.isfinite(value) else str(value) for name, value in data.items()}
        line = json.dumps({"step": step, "data": honest}, ensure_ascii=False, allow_nan=False) + "\n"
        self.pending += line.encode("utf-8")
        self._write()

    def _write(self) -> None:
        """Write the pending bytes; those that do not fit wait for the next step, within a line too."""
        while self.pending:
            self.pending = self.pending[self.file.write(self.pending) :]

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Nothing: this file holds numbers."""

    def close(self) -> None:
        if not self.file.closed:
            try:
                self._write()
            finally:
                self.file.close()


def _time_of(file: Path) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(file.stat().st_mtime))


def _free(path: Path) -> Path:
    """The path, numbered where there is something already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _take_out_a_cut_line(path: Path) -> None:
    """End the file with its last whole line, so that the next one begins a line of its own."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        content = file.read()
        rest = content[content.rfind(b"\n") + 1 :]
        with suppress(ValueError):
            json.loads(rest)
            # Only its end is missing.
            file.write(b"\n")
            return
        logger.warning("%s ended in a line that was cut short, which is taken out: %r", path, rest[:100])
        file.truncate(len(content) - len(rest))


class WandbBackend:
    """Weights & Biases, which takes its key from its own environment variable or login.

    The run's id is kept in `log_dir`, so that a resumed run goes on in it, unless WANDB_RUN_ID names one. Steps that it
    makes again are there already, and W&B leaves out the second ones.
    """

    def __init__(self, run: Run):
        self.wandb = _import_wandb()
        kept = run.log_dir / "wandb_run_id.txt"
        named = os.environ.get("WANDB_RUN_ID")
        if named is None and run.resumed and kept.is_file():
            named = kept.read_text().strip()
        self.run = self.wandb.init(
            project=run.project,
            name=run.experiment,
            config=dict(run.config),
            id=named,
            resume=None if named is None else "allow",
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(self.run.id)

    def log(self, data: Mapping[str, float], step: int) -> None:
        self.run.log(dict(data), step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        table = self.wandb.Table(columns=["step", *Sample._fields], data=[[step, *sample] for sample in samples])
        self.run.log({"val/generations": table}, step=step)

    def close(self) -> None:
        self.run.finish()


BACKENDS: dict[str, type[Backend]] = {
    "console": ConsoleBackend,
    "tensorboard": TensorBoardBackend,
    "file": FileBackend,
    "jsonl": FileBackend,
    "wandb": WandbBackend,
}


def _backends(names: str | Sequence[str]) -> list[type[Backend]]:
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ValueError(f"unknown logger {', '.join(map(repr, unknown))}: known are {', '.join(BACKENDS)}")
    # A dict drops the second of two names for one class.
    return list(dict.fromkeys(BACKENDS[name] for name in names))


def check_loggers(names: str | Sequence[str]) -> None:
    """Find out before any work whether the backends will do. At a terminal, W&B asks for a key that it lacks.

    Raises:
        ValueError: an unknown backend, or no key for W&B.
        ModuleNotFoundError: wandb is asked for and not installed.
    """
    if WandbBackend not in _backends(names):
        return
    wandb = _import_wandb()
    # With a key in the environment there is nothing to ask for, and `login` would look up whose it is over the network.
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled") or os.environ.get("WANDB_API_KEY"):
        return
    try:
        wandb.login(verify=False)
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"trainer.logger asks for wandb, which has no key ({error}): run `wandb login` or set WANDB_API_KEY, set "
            "WANDB_MODE=offline to send it later, or leave wandb out"
        ) from error


def _import_wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "trainer.logger asks for wandb, which is not installed: `pip install wandb`, or leave it out"
        ) from error
    return wandb


def samples_as_markdown(samples: Sequence[Sample]) -> str:
    """A section per sample; texts are indented code blocks, which no character inside them can end."""
    lines = []
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}. rouge-L {sample.rouge:.3f}", ""]
        for name in ("prompt", "answer", "teacher"):
            lines += [f"**{name}**", "", *(f"    {line}" for line in getattr(sample, name).splitlines()), ""]
    return "\n".join(lines)


def _as_number(name: str, value: Any) -> float | int:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise TypeError(
            f"metric {name!r} is a {type(value).__name__}{shape}, but must be one number: an int, a float, "
            "a 0-d tensor or a numpy scalar"
        )
    return value


class Tracking:
    """One or several backends that get the metrics of every step.

    Args:
        project_name, experiment_name: names of the run for wandb and for VERL_FILE_LOGGER_ROOT.
        default_backend: a name from BACKENDS or several.
        config: the run's settings, for wandb.
        log_dir: folder of metrics.jsonl; logs/project/experiment when None.
        resumed: whether the run goes on where an earlier one stopped; if not, its metrics.jsonl starts anew.
        tensorboard_dir: folder of the event files; when None, TENSORBOARD_DIR, else `tensorboard` in log_dir.
        first_step: the step that a resumed run goes on with; None where it makes none again.
        total_steps: of the run, for the console.

    Raises:
        ValueError: an unknown backend; the message names the known ones.
        ModuleNotFoundError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        default_backend: str | Sequence[str] = "console",
        config: Mapping[str, Any] | None = None,
        log_dir: str | Path | None = None,
        tensorboard_dir: str | Path | None = None,
        resumed: bool = True,
        first_step: int | None = None,
        total_steps: int | None = None,
    ):
        backends = _backends(default_backend)
        log_path = Path(log_dir or Path("logs") / project_name / experiment_name).expanduser()
        tensorboard_path = tensorboard_dir or os.environ.get("TENSORBOARD_DIR") or log_path / "tensorboard"
        folders = log_path, Path(tensorboard_path).expanduser()
        run = Run(project_name, experiment_name, config or {}, *folders, resumed, first_step, total_steps)
        self.backends = [backend(run) for backend in backends]
        self._failing: set[Backend] = set()

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record the metrics of a step: floats, ints, 0-d tensors or numpy scalars.

        Raises:
            TypeError: a value is anything else; no backend has got anything of this call then.
        """
        numbers = {name: _as_number(name, value) for name, value in data.items()}
        for backend in self.backends:
            self._try(backend, partial(backend.log, numbers, step), f"step {step}")

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Show validation answers in the backends that can."""
        for backend in self.backends:
            self._try(backend, partial(backend.log_samples, samples, step), f"the samples of step {step}")

    def finish(self) -> None:
        """Close all backends; calling it again does nothing."""
        for backend in self.backends:
            self._try(backend, backend.close, "the last steps")

    def _try(self, backend: Backend, write: Callable[[], None], what: str) -> None:
        """A run is worth more than its log. Said when it begins to fail and when it is over, not at every step."""
        name = type(backend).__name__
        try:
            with waiting(f"trainer.logger {name} has not written {what}"):
                write()
        except OSError as error:
            if backend not in self._failing:
                logger.error("%s could not write %s (%s): the run goes on, and it is tried again", name, what, error)
            self._failing.add(backend)
            return
        if backend in self._failing:
            self._failing.discard(backend)
            logger.warning("%s writes again", name)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()


class ValidationGenerationsLogger:
    """A way to show validation answers: markdown in TensorBoard, a table in wandb, a few lines on the console."""

    def log(self, loggers: Tracking, samples: Sequence[Sample | tuple[str, str, str, float]], step: int) -> None:
        """Send (prompt, answer, teacher's answer, rouge-L) rows to the backends of `loggers`."""
        loggers.log_samples([Sample(*sample) for sample in samples], step)
