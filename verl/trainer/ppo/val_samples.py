"""All answers of each validation, in the run's folder: `val_samples/step_N.parquet`.

Columns: step, prompt (the last user's text), teacher, student, score and teacher_score (the discriminator's; null where
there is none), tokens (of the student's answer, its EOS included), finish_reason ("stop" or "length"). One row per
answer, in the order of the data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from verl.utils.dump import dump_parquet
from verl.utils.tracking import Sample

logger = logging.getLogger(__name__)

FOLDER = "val_samples"
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "prompt": pa.string(),
        "teacher": pa.string(),
        "student": pa.string(),
        "score": pa.float64(),
        "teacher_score": pa.float64(),
        "tokens": pa.int64(),
        "finish_reason": pa.string(),
    }
)


def write_val_samples(run: Path, step: int, samples: Sequence[Sample]) -> None:
    """Write a validation's answers; those of an earlier validation of the same step are replaced. A disk that is full
    is reported and ends nothing."""
    rows = [sample._asdict() | {"step": step, "student": sample.answer} for sample in samples]
    table = pa.Table.from_pylist([{name: row[name] for name in SCHEMA.names} for row in rows], SCHEMA)
    dump_parquet(run / FOLDER / f"step_{step}.parquet", table)


def set_val_samples_aside(run: Path) -> None:
    """Move the files of an earlier run into a folder beside them, named by the time they were last written."""
    files = sorted((run / FOLDER).glob("step_*.parquet"))
    if not files:
        return
    try:
        newest = max(file.stat().st_mtime for file in files)
        aside = run / FOLDER / time.strftime("%Y%m%d-%H%M%S", time.localtime(newest))
        aside.mkdir(exist_ok=True)
        for file in files:
            file.rename(aside / file.name)
    except OSError as error:
        logger.error("%s could not be moved aside (%s): the run goes on", run / FOLDER, error)
