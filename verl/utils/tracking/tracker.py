"""Sends every step to all trackers that were asked for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

from verl.utils.stalls import waiting
from verl.utils.tracking.base import Backend, Run, Sample
from verl.utils.tracking.console import ConsoleBackend
from verl.utils.tracking.file import FileBackend
from verl.utils.tracking.mlflow import MlflowBackend
from verl.utils.tracking.queued import Queued
from verl.utils.tracking.swanlab import SwanlabBackend
from verl.utils.tracking.tensorboard import TensorBoardBackend
from verl.utils.tracking.trackio import TrackioBackend
from verl.utils.tracking.wandb import WandbBackend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, type[Backend]] = {
    "console": ConsoleBackend,
    "tensorboard": TensorBoardBackend,
    "file": FileBackend,
    "jsonl": FileBackend,
    "wandb": WandbBackend,
    "mlflow": MlflowBackend,
    "swanlab": SwanlabBackend,
    "trackio": TrackioBackend,
}
# What a run's end waits at most for what remote trackers have not taken yet.
FLUSH_S = 60.0


def _backends(names: str | Sequence[str]) -> dict[str, type[Backend]]:
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ValueError(f"unknown logger {', '.join(map(repr, unknown))}: known are {', '.join(BACKENDS)}")
    # Of two names for one class, the first.
    return {name: kind for name, kind in zip(names, map(BACKENDS.get, names), strict=True) if _first(name, names)}


def _first(name: str, names: Sequence[str]) -> bool:
    return name == next(other for other in names if BACKENDS[other] is BACKENDS[name])


def check_loggers(names: str | Sequence[str]) -> None:
    """Find out before any work whether the backends will do. At a terminal, W&B asks for a key that it lacks.

    Raises:
        ValueError: an unknown backend, or one without its key.
        ModuleNotFoundError: the package of one is not installed.
    """
    backends = _backends(names).values()
    for backend in backends:
        backend.check_installed()
    for backend in backends:
        backend.check_access()


def _as_number(name: str, value: Any) -> float | int:
    # Of torch or numpy; neither need be loaded for that.
    if getattr(value, "ndim", None) == 0:
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

    Those that may wait for somebody else are called in threads of their own. No backend ends a run: what goes wrong in
    one is said when it begins and when it is over.

    Args:
        project_name, experiment_name: names of the run for trackers and for VERL_FILE_LOGGER_ROOT.
        default_backend: a name from BACKENDS or several.
        config: the run's settings, for trackers.
        log_dir: folder of metrics.jsonl; logs/project/experiment when None.
        resumed: whether the run goes on where an earlier one stopped; if not, its metrics.jsonl starts anew.
        tensorboard_dir: folder of the event files; when None, TENSORBOARD_DIR, else `tensorboard` in log_dir.
        first_step: the step that a resumed run goes on with; None where it makes none again.
        total_steps: of the run, for the console.

    Raises:
        ValueError: an unknown backend; the message names the known ones.
        ModuleNotFoundError: the package of one is not installed.
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
        for backend in backends.values():
            backend.check_installed()
        log_path = Path(log_dir or Path("logs") / project_name / experiment_name).expanduser()
        tensorboard_path = tensorboard_dir or os.environ.get("TENSORBOARD_DIR") or log_path / "tensorboard"
        folders = log_path, Path(tensorboard_path).expanduser()
        run = Run(project_name, experiment_name, config or {}, *folders, resumed, first_step, total_steps)
        self._local = [opened for kind in backends.values() if not kind.remote and (opened := _opened(kind, run))]
        self._remote = [Queued(name, lambda kind=kind: kind(run)) for name, kind in backends.items() if kind.remote]
        self._failing: set[Backend] = set()

    @property
    def backends(self) -> list[Backend]:
        """Those that are open; a remote one is from some time after the start on."""
        return self._local + [queued.backend for queued in self._remote if queued.backend is not None]

    @property
    def metrics_file(self) -> Path | None:
        """The JSONL file with the run's metrics, where one is written."""
        return next((backend.path for backend in self._local if isinstance(backend, FileBackend)), None)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record the metrics of a step: floats, ints, 0-d tensors or numpy scalars.

        Raises:
            TypeError: a value is anything else; no backend has got anything of this call then.
        """
        numbers = {name: _as_number(name, value) for name, value in data.items()}
        self._to_all(f"step {step}", methodcaller("log", numbers, step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Show validation answers in the backends that can."""
        self._to_all(f"the samples of step {step}", methodcaller("log_samples", samples, step))

    def alert(self, title: str, text: str, step: int) -> None:
        """Send an alarm to the backends that have a place for it, for instance W&B's own alerts."""
        self._to_all(f"the alarm of step {step}", methodcaller("alert", title, text, step))

    def flush(self, seconds: float = FLUSH_S) -> bool:
        """Wait until remote backends have taken everything; whether they have within so many seconds."""
        end = time.monotonic() + seconds
        return all([queued.flush(max(0.0, end - time.monotonic())) for queued in self._remote])

    def finish(self) -> None:
        """Close all backends, the remote ones within FLUSH_S; calling it again does nothing."""
        for queued in self._remote:
            queued.stop()
        for backend in self._local:
            self._try(backend, "the last steps", methodcaller("close"))
        end = time.monotonic() + FLUSH_S
        for queued in self._remote:
            queued.join(end - time.monotonic())

    def _to_all(self, what: str, write: Callable[[Backend], None]) -> None:
        for queued in self._remote:
            queued.put(what, write)
        for backend in self._local:
            self._try(backend, what, write)

    def _try(self, backend: Backend, what: str, write: Callable[[Backend], None]) -> None:
        """A run is worth more than its log. Said when it begins to fail and when it is over, not at every step."""
        name = type(backend).__name__
        try:
            with waiting(f"trainer.logger {name} has not written {what}"):
                write(backend)
        except Exception as error:
            if backend not in self._failing:
                logger.error(
                    "%s could not write %s (%s: %s): the run goes on, and it is tried again",
                    name, what, type(error).__name__, error,
                )  # fmt: skip
            self._failing.add(backend)
            return
        if backend in self._failing:
            self._failing.discard(backend)
            logger.warning("%s writes again", name)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()


def _opened(kind: type[Backend], run: Run) -> Backend | None:
    try:
        return kind(run)
    except OSError as error:
        logger.error("%s could not be opened (%s): the run goes on without it", kind.__name__, error)
        return None


class ValidationGenerationsLogger:
    """A way to show validation answers: a few lines on the console, texts or tables in trackers."""

    def log(self, loggers: Tracking, samples: Sequence[Sample | tuple], step: int) -> None:
        """Send rows as `Sample` has them, (prompt, answer, teacher's answer, rouge-L, ...), to the backends."""
        loggers.log_samples([Sample(*sample) for sample in samples], step)
