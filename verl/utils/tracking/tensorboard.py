"""Metrics, answers and alarms in TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from verl.utils.tracking.base import Backend, Run, Sample, samples_as_markdown, time_of


class TensorBoardBackend(Backend):
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
        self.writer = None
        # Else the first step tries again, and says what is wrong.
        with suppress(OSError):
            self._open()

    def _move_aside(self) -> None:
        files = sorted(self.folder.glob("events.out.tfevents.*"))
        if files:
            aside = self.folder / time_of(max(files, key=lambda file: file.stat().st_mtime))
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

    def alert(self, title: str, text: str, step: int) -> None:
        self._write(lambda: self.writer.add_text(f"alarms/{title}", text, step), step)

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
