"""What a tracker is, and what it is given."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One validation answer next to the teacher's; plain tuples in this order do as well, of four or of all.

    score, teacher_score: the discriminator's, of the answer and of the teacher's; None where there is none.
    tokens: of the answer, its EOS included.
    finish_reason: "stop" where the answer came to its end, "length" where it was cut.
    """

    prompt: str
    answer: str
    teacher: str
    rouge: float
    score: float | None = None
    teacher_score: float | None = None
    tokens: int | None = None
    finish_reason: str | None = None

    def summary(self) -> str:
        """Its numbers, on one line."""
        parts = [f"rouge-L {self.rouge:.3f}"]
        if self.score is not None:
            parts.append(f"score {self.score:.3g}, teacher {self.teacher_score:.3g}")
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens, {self.finish_reason}")
        return " - ".join(parts)


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


class Backend:
    """A place for metrics. What fails in writing raises, and the next call is another try; `close` may be called more
    than once.

    remote: whether it may wait for somebody else. It is then built, called and closed in one thread beside the run.
    package: without which it cannot work.
    """

    remote: ClassVar[bool] = False
    package: ClassVar[str | None] = None

    def __init__(self, run: Run):
        pass

    @classmethod
    def check_installed(cls) -> None:
        """ModuleNotFoundError: its package is missing."""
        spec = None if cls.package is None else find_spec(cls.package)
        # A folder of that name, where W&B for one leaves its runs, is a package without an origin.
        if cls.package is not None and (spec is None or spec.origin is None):
            raise ModuleNotFoundError(
                f"trainer.logger asks for {cls.package}, which is not installed: `pip install {cls.package}`, or leave "
                "it out"
            )

    @classmethod
    def check_access(cls) -> None:
        """ValueError: it lacks a key."""

    def log(self, data: Mapping[str, float], step: int) -> None:
        """A step's metrics."""
        raise NotImplementedError

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Validation answers, where it has a place for them."""

    def alert(self, title: str, text: str, step: int) -> None:
        """An alarm, where it has a place for it. Who raises one logs it, too."""

    def close(self) -> None:
        """Write what is left; nothing is logged any more."""


def earlier_run(run: Run, tracker: str) -> str | None:
    """The id of the tracker's own run to go on with: what the environment names, such as WANDB_RUN_ID, else the earlier
    one's where this run goes on with it."""
    named = os.environ.get(f"{tracker.upper()}_RUN_ID")
    kept = _id_file(run, tracker)
    if named is None and run.resumed and kept.is_file():
        named = kept.read_text().strip()
    return named or None


def keep_run(run: Run, tracker: str, run_id: str) -> None:
    """Keep the id for `earlier_run`, as `{tracker}_run_id.txt` in `log_dir`."""
    kept = _id_file(run, tracker)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(run_id)
    except OSError as error:
        logger.error("%s could not be written (%s): a resumed run will be a new one there", kept, error)


def _id_file(run: Run, tracker: str) -> Path:
    return run.log_dir / f"{tracker}_run_id.txt"


def time_of(file: Path) -> str:
    """When it was last written, to name it by."""
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(file.stat().st_mtime))


def samples_as_markdown(samples: Sequence[Sample]) -> str:
    """A section per sample; texts are indented code blocks, which no character inside them can end."""
    lines = []
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}. {sample.summary()}", ""]
        for name, text in (("prompt", sample.prompt), ("teacher", sample.teacher), ("student", sample.answer)):
            lines += [f"**{name}**", "", *(f"    {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)
