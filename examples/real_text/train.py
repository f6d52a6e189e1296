"""One run of the experiment: training without Ray on one GPU (or slowly on CPU), and answers to the judge's prompts.

The answers come from the run's own engine, so that nothing has to be built twice: after some of the steps, and at the
end. `answers-STEP-at-TEMPERATURE.parquet` has a row per answer, those to one prompt in a row: content (the prompt),
teacher, text, tokens (EOS among them), finish_reason ("length" if it was cut), split ("judge" or "test": two halves of
the prompts, for judges that do not cross-validate), `seconds`, the training time so far, and where the run has a
discriminator its `score` and `teacher_score`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from examples.real_text.plan import ANSWERS, BY_NAME, COMMON, TEMPERATURES, Run
from verl.batch import Answers, Prompts, Scores, table
from verl.protocol import DataProto
from verl.trainer.config import compose_config
from verl.trainer.in_process import InProcessRunner, InProcessTrainer
from verl.trainer.ppo.core_algos import ends_with_eos
from verl.trainer.ppo.steps import Step, Timed
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

# Far from the seeds of training and validation.
ANSWER_SEED = 3_000_017


class AnsweringTrainer(InProcessTrainer):
    """The trainer, answering the judge's prompts on the way.

    `answer_every` steps, besides the end; `stop_at`: a time (`time.time`) after which no further step begins;
    `trains`: False only answers.
    """

    judge_file: Path
    answer_every: int | None
    stop_at: float
    trains: bool

    def fit(self) -> None:
        """Train and answer."""
        self.training_seconds = 0.0
        data = replace(self.config.data, truncation="left", filter_overlong_prompts=False)
        self.judge_rows = RLHFDataset(self.judge_file, self.tokenizer, data, eos_token_ids=self.student.eos_token_ids)
        if self.trains:
            super().fit()
        self._answer()

    def _batches(self):
        for batch in super()._batches():
            if time.time() > self.stop_at:
                return
            yield batch

    def _make_step(self, prompts: Prompts, timed: Timed) -> Step:
        if self.answer_every and self.global_step and self.global_step % self.answer_every == 0:
            self._answer()
        start = time.perf_counter()
        step = super()._make_step(prompts, timed)
        self.training_seconds += time.perf_counter() - start
        return step

    def _answer(self) -> None:
        """Answers to the judge's prompts from the present weights, at every temperature that is judged."""
        for temperature in TEMPERATURES:
            sampling = replace(self.config.actor_rollout_ref.rollout.sampling, n=ANSWERS, temperature=temperature)
            parts = []
            for number, rows in enumerate(DataLoader(self.judge_rows, batch_size=1024, collate_fn=collate_fn)):
                prompts = Prompts.of(DataProto.from_single_dict(rows))
                answers = self.student.sample(table(prompts), sampling, ANSWER_SEED + number)
                parts.append(self._frame(prompts, answers))
            frame = pd.concat(parts, ignore_index=True)
            frame["split"] = ["judge" if row // ANSWERS % 2 else "test" for row in range(len(frame))]
            frame["seconds"] = self.training_seconds
            folder = Path(self.config.trainer.default_local_dir)
            frame.to_parquet(folder / f"answers-{self.global_step}-at-{temperature}.parquet")

    def _frame(self, prompts: Prompts, answers: Answers) -> pd.DataFrame:
        responses, mask = answers.responses, answers.response_mask
        ended = ends_with_eos(responses, mask, self.student.eos_token_ids).flatten()
        repeated = np.repeat(np.arange(len(responses)), ANSWERS)
        columns: dict[str, Any] = {
            "content": [prompts.raw_prompt[row][-1]["content"] for row in repeated],
            "teacher": prompts.teacher_text[repeated],
            "text": self.student.texts(responses, mask),
            "tokens": mask.sum(-1).flatten().tolist(),
            "finish_reason": ["stop" if end else "length" for end in ended],
        }
        columns["finish"] = columns["finish_reason"]
        if self.discriminator is not None:
            scores = Scores.of(self.discriminator.scores(table(prompts, answers)))
            columns["score"] = scores.student_scores.flatten().tolist()
            columns["teacher_score"] = scores.teacher_scores[repeated, 0].tolist()
        return pd.DataFrame(columns)


def source(out: Path, run: Run, model: Path) -> Path:
    """The student that a run starts from."""
    if run.parent is None:
        return model
    folder = out / run.parent
    if run.start.endswith("@best"):
        return folder / "best" / "actor"
    step = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / f"global_step_{step}" / "actor"


def settings(run: Run, data: Path, out: Path, model: Path, seed: int, extra: list[str]) -> tuple[list[str], int | None]:
    """A run's overrides, and the steps between its answers."""
    rows = len(pd.read_parquet(data / "train.parquet", columns=["teacher_response"]))
    overrides = [
        *COMMON,
        *run.overrides,
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/val.parquet",
        "data.return_raw_chat=True",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={source(out, run, model)}",
        f"critic.model.path={model}",
        f"trainer.experiment_name={run.name}",
        f"trainer.default_local_dir={out}/{run.name}",
    ]
    batch = compose_config([*overrides, *extra]).data.train_batch_size
    per_epoch = rows // batch
    if run.epochs is None:
        overrides.append(f"trainer.total_training_steps={max(1, run.steps)}")
        return [*overrides, *extra], run.answer_every
    overrides += [f"trainer.total_training_steps={run.epochs * per_epoch}", f"trainer.test_freq={per_epoch}"]
    return [*overrides, *extra], None if run.answer_every is None else run.answer_every * per_epoch


def train_and_answer(
    name: str, data: Path, out: Path, model: Path, seed: int, extra: list[str], stop_at: float
) -> None:
    """One run, in this process; `done` in its folder says that it is."""
    run = BY_NAME[name]
    overrides, every = settings(run, data, out, model, seed, extra)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)

    class Trainer(AnsweringTrainer):
        judge_file = data / "judge.parquet"
        answer_every = every
        trains = run.steps != 0

    Trainer.stop_at = stop_at

    class Runner(InProcessRunner):
        trainer_class = Trainer

    Runner().run(compose_config(overrides))
    (folder / "done").touch()
