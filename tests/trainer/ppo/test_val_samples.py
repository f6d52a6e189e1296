"""The answers of validations in parquet. That a run writes them is in `tests/e2e/test_stages.py`."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.utils.test_tracking_goes_on import disk_full_after
from verl.batch import Answers, Prompts, Scores
from verl.trainer.ppo.val_samples import SCHEMA, set_val_samples_aside, write_val_samples
from verl.trainer.ppo.validation import Answered, Validation
from verl.utils.tracking import Sample

SAMPLES = [
    Sample("写一首诗", "春眠不觉晓\x1b[2J", "床前明月光", 0.5, 0.25, -1.5, 7, "stop"),
    Sample("Say hi.", "", "Hi!", 0.0, 0.5, 1.0, 10, "length"),
]
ROWS = [
    {
        "step": 3, "prompt": "写一首诗", "teacher": "床前明月光", "student": "春眠不觉晓\x1b[2J", "score": 0.25,
        "teacher_score": -1.5, "tokens": 7, "finish_reason": "stop",
    },
    {
        "step": 3, "prompt": "Say hi.", "teacher": "Hi!", "student": "", "score": 0.5, "teacher_score": 1.0,
        "tokens": 10, "finish_reason": "length",
    },
]  # fmt: skip


def read(folder, step):
    table = pq.read_table(folder / "val_samples" / f"step_{step}.parquet")
    assert table.schema.equals(SCHEMA)
    return table.to_pylist()


def names(folder):
    return sorted(path.name for path in (folder / "val_samples").iterdir())


def test_one_row_per_answer_with_texts_as_they_are(tmp_path):
    write_val_samples(tmp_path, 3, SAMPLES)
    assert read(tmp_path, 3) == ROWS


def test_without_a_discriminator_scores_are_null_and_stay_numbers(tmp_path):
    write_val_samples(tmp_path, 0, [sample._replace(score=None, teacher_score=None) for sample in SAMPLES])
    assert [(row["score"], row["teacher_score"]) for row in read(tmp_path, 0)] == [(None, None)] * 2


def test_a_step_that_is_made_again_replaces_its_file(tmp_path):
    write_val_samples(tmp_path, 3, [Sample("old", "old", "old", 0.0, None, None, 1, "stop")] * 5)
    # What a run that was killed amid writing has left.
    (tmp_path / "val_samples" / "step_3.parquet.tmp").write_bytes(b"PAR1")
    write_val_samples(tmp_path, 3, SAMPLES)
    assert read(tmp_path, 3) == ROWS and names(tmp_path) == ["step_3.parquet"]


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_ends_nothing_and_leaves_the_earlier_file(tmp_path, caplog, room):
    write_val_samples(tmp_path, 3, SAMPLES)
    with disk_full_after(room):
        write_val_samples(tmp_path, 3, SAMPLES * 1000)
        write_val_samples(tmp_path, 4, SAMPLES * 1000)
    assert caplog.text.count("the run goes on without it") == 2 and "step_4.parquet could not be written" in caplog.text
    assert read(tmp_path, 3) == ROWS and names(tmp_path) == ["step_3.parquet"]
    write_val_samples(tmp_path, 4, SAMPLES)
    assert len(read(tmp_path, 4)) == 2


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path, caplog):
    (tmp_path / "val_samples").write_text("a file")
    write_val_samples(tmp_path, 3, SAMPLES)
    set_val_samples_aside(tmp_path)
    assert caplog.text.count("could not be written") == 1


def test_a_fresh_start_moves_earlier_files_aside(tmp_path):
    set_val_samples_aside(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for step in (3, 10):
        write_val_samples(tmp_path, step, SAMPLES)
    file = tmp_path / "val_samples" / "step_3.parquet"
    os.utime(file, (0, time.mktime((2000, 2, 24, 12, 30, 5, 0, 0, -1))))
    os.utime(file.with_name("step_10.parquet"), (0, 900_000_000))
    set_val_samples_aside(tmp_path)
    assert names(tmp_path) == ["20000224-123005"]
    assert sorted(os.listdir(tmp_path / "val_samples" / "20000224-123005")) == ["step_10.parquet", "step_3.parquet"]
    set_val_samples_aside(tmp_path)
    assert names(tmp_path) == ["20000224-123005"]


# ---- from a batch


EOS = 9


class Student:
    """Tokens are digits of their texts."""

    eos_token_ids = (EOS, 8)

    def texts(self, ids, mask):
        rows = zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)
        return ["".join(str(token) for token in row[real.bool()].tolist() if token < 8) for row, real in rows]


def test_two_answers_to_each_of_two_prompts():
    messages = np.empty(2, dtype=object)
    messages[0] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    messages[1] = [{"role": "system", "content": "No user here."}]
    ones = torch.ones(2, 2, dtype=torch.long)
    prompts = Prompts(
        torch.tensor([[1, 2], [3, 4]]), ones, ones, ones, np.arange(2), np.array(["12", "77"], dtype=object), messages
    )
    responses = torch.tensor([[[1, 2, EOS], [1, 2, 3]], [[8, 0, 0], [5, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 0, 0]]])
    students, teachers = torch.tensor([[0.5, 1.0], [1.5, 2.0]]), torch.tensor([[3.0], [4.0]])
    scores = Scores(students, teachers, students, teachers, mask.sum(-1), torch.ones(2, 1))
    validation = Validation(None, Student(), None, None, None, None, None, 0)
    part = Answered(prompts, Answers(responses, mask), None, scores)
    assert validation._samples(part) == [
        Sample("Two?", "12", "12", 1.0, 0.5, 3.0, 3, "stop"),
        Sample("Two?", "123", "12", 0.0, 1.0, 3.0, 3, "length"),
        Sample("34", "", "77", 0.0, 1.5, 4.0, 1, "stop"),
        Sample("34", "5", "77", 0.0, 2.0, 4.0, 1, "length"),
    ]
    bare = Answered(replace(prompts, raw_prompt=None), *part[1:3], None)
    assert [(row.prompt, row.score, row.teacher_score) for row in validation._samples(bare)] == [
        *[("12", None, None)] * 2, *[("34", None, None)] * 2
    ]  # fmt: skip
