"""The places that metrics go to: console, TensorBoard, a JSONL file; W&B, MLflow, SwanLab, Trackio.

A backend is a small class with `log`, `log_samples`, `alert` and `close`, in a module of its own; BACKENDS names them,
and Tracking sends every step to those that were asked for.

A resumed run goes on where the earlier one was logged, and the steps that it makes again count once, where the tracker
can do that. A run that starts afresh in a used folder moves what is there aside. A backend that cannot write, on a full
disk or without a network for instance, does not end the run, and one that is slow does not slow it: it is said, and
what can be kept for later is.
"""

from verl.utils.tracking.base import Backend, Run, Sample, samples_as_markdown
from verl.utils.tracking.console import ConsoleBackend
from verl.utils.tracking.file import FileBackend
from verl.utils.tracking.mlflow import MlflowBackend
from verl.utils.tracking.queued import ending_in_time
from verl.utils.tracking.swanlab import SwanlabBackend
from verl.utils.tracking.tensorboard import TensorBoardBackend
from verl.utils.tracking.tracker import BACKENDS, Tracking, ValidationGenerationsLogger, check_loggers
from verl.utils.tracking.trackio import TrackioBackend
from verl.utils.tracking.wandb import WandbBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "ConsoleBackend",
    "FileBackend",
    "MlflowBackend",
    "Run",
    "Sample",
    "SwanlabBackend",
    "TensorBoardBackend",
    "Tracking",
    "TrackioBackend",
    "ValidationGenerationsLogger",
    "WandbBackend",
    "check_loggers",
    "ending_in_time",
    "samples_as_markdown",
]
