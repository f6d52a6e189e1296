"""MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from verl.utils.tracking.base import Backend, Run, Sample, earlier_run, keep_run, samples_as_markdown

# What its servers take in one request, and of one setting.
METRICS_AT_ONCE, SETTINGS_AT_ONCE = 1000, 100
LONGEST_SETTING = 500
REFUSED = re.compile(r"[^/\w.\- :]")


class MlflowBackend(Backend):
    """MLflow, at MLFLOW_TRACKING_URI or where it keeps runs by itself, `mlflow.db` in the working folder. The project
    is an experiment there.

    A resumed run goes on in the earlier one's. Of a step that is made again it keeps both, the later one last.
    """

    remote: ClassVar[bool] = True
    package: ClassVar[str | None] = "mlflow"

    def __init__(self, run: Run):
        from mlflow import MlflowClient, entities

        self.entities = entities
        self.client = MlflowClient()
        self.run_id = self._earlier(run) or self._new(run)
        keep_run(run, "mlflow", self.run_id)

    def _earlier(self, run: Run) -> str | None:
        from mlflow.exceptions import MlflowException

        named = earlier_run(run, "mlflow")
        if named is not None:
            # It may have been deleted, or be of another server.
            with suppress(MlflowException):
                self.client.update_run(named, status="RUNNING")
                return named
        return None

    def _new(self, run: Run) -> str:
        experiment = self.client.get_experiment_by_name(run.project)
        there = self.client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        run_id = self.client.create_run(there, run_name=run.experiment).info.run_id
        settings = [self.entities.Param(name, str(value)[:LONGEST_SETTING]) for name, value in _flat(run.config)]
        for start in range(0, len(settings), SETTINGS_AT_ONCE):
            self.client.log_batch(run_id, params=settings[start : start + SETTINGS_AT_ONCE])
        return run_id

    def log(self, data: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.entities.Metric(_name(name), float(value), now, step) for name, value in data.items()]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.client.log_text(self.run_id, samples_as_markdown(samples), f"val_generations/step_{step}.md")

    def alert(self, title: str, text: str, step: int) -> None:
        self.client.set_tag(self.run_id, _name(f"alarms/{title}"), text)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


def _name(name: str) -> str:
    """With an underscore for what MLflow does not take in a name."""
    return REFUSED.sub("_", name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _name(f"{prefix}{name}"), value
