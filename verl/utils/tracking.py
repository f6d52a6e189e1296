"""Where metrics go: console, TensorBoard, a JSONL file, Weights & Biases.

A backend is a small class with `log`, `log_samples` and `close`; BACKENDS names them, and Tracking sends every step to
those that were asked for.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from verl.utils.console import printable


class Sample(NamedTuple):
    """One validation answer next to the teacher's; plain tuples in this order do as well."""

    prompt: str
    answer: str
    teacher: str
    rouge: float


@dataclass(frozen=True)
class Run:
    """What a backend may need to know about the run it records."""

    project: str
    experiment: str
    config: Mapping[str, Any]
    log_dir: Path
    tensorboard_dir: Path
    resumed: bool = True


class Backend(Protocol):
    """A place for metrics. Constructed with the Run; `close` may be called more than once."""

    def __init__(self, run: Run): ...

    def log(self, data: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, samples: Sequence[Sample], step: int) -> None: ...

    def close(self) -> None: ...


class ConsoleBackend:
    """One line per step, `step:{n} - key:value - ...`, and the first validation samples, shortened."""

    shown_samples = 2
    shown_characters = 200

    def __init__(self, run: Run):
        pass

    def log(self, data: Mapping[str, float], step: int) -> None:
        values = [
            f"{name}:{value:.6g}" if isinstance(value, float) else f"{name}:{value}" for name, value in data.items()
        ]
        self._write(" - ".join([f"step:{step}", *values]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for sample in samples[: self.shown_samples]:
            texts = zip(("prompt", "answer", "teacher"), sample, strict=False)
            lines = [f"  {name}: {self._shorten(text)}" for name, text in texts]
            self._write("\n".join([f"step:{step} - sample with rouge-L {sample.rouge:.3f}", *lines]))

    def close(self) -> None:
        pass

    def _shorten(self, text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= self.shown_characters else line[: self.shown_characters] + "..."

    def _write(self, text: str) -> None:
        tqdm.write(printable(text))  # print would run into a progress bar's line
        sys.stdout.flush()


class TensorBoardBackend:
    """TensorBoard event files in the run's `tensorboard_dir`, on disk after every step."""

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

        self.writer = SummaryWriter(log_dir=str(run.tensorboard_dir))

    def log(self, data: Mapping[str, float], step: int) -> None:
        for name, value in data.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.writer.add_text("val/generations", samples_as_markdown(samples), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class FileBackend:
    """JSONL, one line per step: {"step": N, "data": {name: value}}, appended and on disk after every step.

    The file is VERL_FILE_LOGGER_PATH, else VERL_FILE_LOGGER_ROOT/project/experiment.jsonl, else log_dir/metrics.jsonl.
    JSON has no number for nan and the infinities, so they are the strings "nan", "inf" and "-inf"; Python's float()
    reads them. A resumed run appends: of two lines for one step, the later counts. A run that starts afresh where there
    is a file already moves it aside, to the same name with the time it was last written.
    """

    def __init__(self, run: Run):
        self.path = self._path(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not run.resumed and self.path.exists():
            written = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))
            self.path.rename(self.path.with_suffix(f".{written}.jsonl"))
        self.file = self.path.open("a", encoding="utf-8")

    @staticmethod
    def _path(run: Run) -> Path:
        if path := os.environ.get("VERL_FILE_LOGGER_PATH"):
            return Path(path).expanduser()
        if root := os.environ.get("VERL_FILE_LOGGER_ROOT"):
            return Path(root).expanduser() / run.project / f"{run.experiment}.jsonl"
        return run.log_dir / "metrics.jsonl"

    def log(self, data: Mapping[str, float], step: int) -> None:
        honest = {name: value if math.isfinite(value) else str(value) for name, value in data.items()}
        self.file.write(json.dumps({"step": step, "data": honest}, ensure_ascii=False, allow_nan=False) + "\n")
        self.file.flush()

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Nothing: this file holds numbers."""

    def close(self) -> None:
        self.file.close()


class WandbBackend:
    """Weights & Biases, which takes its key from its own environment variable or login."""

    def __init__(self, run: Run):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "trainer.logger asks for wandb, which is not installed: `pip install wandb`, or leave it out"
            ) from error
        self.wandb = wandb
        self.run = wandb.init(project=run.project, name=run.experiment, config=dict(run.config))

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
    """Sends the metrics of every step to one or several backends.

    Args:
        project_name, experiment_name: names of the run for wandb and for VERL_FILE_LOGGER_ROOT.
        default_backend: a name from BACKENDS or several.
        config: the run's settings, for wandb.
        log_dir: folder of metrics.jsonl; logs/project/experiment when None.
        resumed: whether the run goes on where an earlier one stopped; if not, its metrics.jsonl starts anew.
        tensorboard_dir: folder of the event files; when None, TENSORBOARD_DIR, else `tensorboard` in log_dir.

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
    ):
        names = [default_backend] if isinstance(default_backend, str) else list(default_backend)
        unknown = [name for name in names if name not in BACKENDS]
        if unknown:
            raise ValueError(f"unknown logger {', '.join(map(repr, unknown))}: known are {', '.join(BACKENDS)}")
        log_path = Path(log_dir or Path("logs") / project_name / experiment_name).expanduser()
        tensorboard_path = tensorboard_dir or os.environ.get("TENSORBOARD_DIR") or log_path / "tensorboard"
        run = Run(project_name, experiment_name, config or {}, log_path, Path(tensorboard_path).expanduser(), resumed)
        # A dict drops the second of two names for one class.
        self.backends = [backend(run) for backend in dict.fromkeys(BACKENDS[name] for name in names)]

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Records the metrics of a step: floats, ints, 0-d tensors or numpy scalars.

        Raises:
            TypeError: a value is anything else; no backend has then got anything of this call.
        """
        numbers = {name: _as_number(name, value) for name, value in data.items()}
        for backend in self.backends:
            backend.log(numbers, step)

    def finish(self) -> None:
        """Closes all backends; calling it again does nothing."""
        for backend in self.backends:
            backend.close()

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()


class ValidationGenerationsLogger:
    """Shows validation answers: markdown in TensorBoard, a table in wandb, a few lines on the console."""

    def log(self, loggers: Tracking, samples: Sequence[Sample | tuple[str, str, str, float]], step: int) -> None:
        """Sends (prompt, answer, teacher's answer, rouge-L) rows to the backends of `loggers`."""
        rows = [Sample(*sample) for sample in samples]
        for backend in loggers.backends:
            backend.log_samples(rows, step)
