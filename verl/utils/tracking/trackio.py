"""Trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.utils.tracking.base import Backend, Run, Sample


class TrackioBackend(Backend):
    """Trackio: a database in TRACKIO_DIR or its own folder at home, or the server or Space that its environment
    variables name.

    A resumed run goes on in the latest of its name.
    """

    remote: ClassVar[bool] = True
    package: ClassVar[str | None] = "trackio"

    def __init__(self, run: Run):
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=run.project,
            name=run.experiment,
            config=dict(run.config),
            resume="allow" if run.resumed else "never",
            embed=False,
        )
        self.open = True

    def log(self, data: Mapping[str, float], step: int) -> None:
        self.run.log(dict(data), step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        # Not above: whoever has no trackio need not wait for it.
        import pandas as pd

        self.run.log({"val/generations": self.trackio.Table(dataframe=pd.DataFrame(samples))}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        self.run.alert(title=title, text=text, level=self.trackio.AlertLevel.WARN)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.run.finish()
