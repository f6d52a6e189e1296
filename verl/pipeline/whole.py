"""A pipeline from its first stage to the summary. Whatever is done is not done again."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.models.content import content_of_model
from verl.pipeline.needs import room
from verl.pipeline.options import NUMBERS
from verl.pipeline.preflight import Look, Preflight
from verl.pipeline.processes import Processes, wait_until_left
from verl.pipeline.results import (
    STUDENTS,
    Student,
    judge,
    judged_once,
    judges_by_discriminators,
    merge_student,
    write_report,
)
from verl.pipeline.settings import arguments_of, run_folder, user_settings
from verl.pipeline.state import State, handed_on
from verl.pipeline.summary import BASE, conclude, describe, headline, problems
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in, tracked_step
from verl.utils.console import say
from verl.utils.refusals import Refused
from verl.utils.run_lock import check_writable, only_run_in

WRONG, OK = 2, 0
JUDGE_FAILED = """\
the students are trained and merged; the judge failed. Where a GPU's memory was too little for its engine, the same line
with a lower --judge_memory asks it again; --no_judge does without it"""


class Pipeline:
    """One line's stages and what is made of them.

    Args:
        options: the flags (`options.py`).
    """

    def __init__(self, options: Namespace):
        self.options = options
        self.out: Path = options.out
        self.processes = Processes()

    # ------------------------------------------------------------ looking

    def dry_run(self) -> int:
        """Say what would run and all problems; returns the exit code."""
        found = self._look(measure=True)
        if len(found.looks) < len(self.options.stages):
            say(problems(found.problems))
            return WRONG
        space = room(self.out, found.looks)
        say(describe(self.options, found.looks, space, self._judging(found.looks)))
        wrong = [*found.problems, *filter(None, [space.problem(self.out)])]
        say(problems(wrong) if wrong else "no problem was found")
        return WRONG if wrong else OK

    def _look(self, measure: bool = False) -> Preflight:
        """All stages as they stand. ValueError where the folder is another one's."""
        if checkpoints_in(self.out):
            raise ValueError(f"{self.out} holds the checkpoints of a single run: take another --exp_name, or --out")
        preflight = Preflight(self.options, State(self.out), measure)
        # The stages say all this again; a dry run is where one reads it.
        with _at_least(logging.WARNING if measure else logging.ERROR):
            preflight.look()
        return preflight

    def _judging(self, looks: list[Look]) -> str:
        config = next((look.config for look in looks if look.config), None)
        if self.options.no_judge or config is None:
            return "no (--no_judge)" if self.options.no_judge else "not known"
        try:
            base = config.actor_rollout_ref.model.path
            by_discriminators, why = judges_by_discriminators(self.options, config, base)
        except (OSError, ValueError) as error:
            return f"not known ({error})"
        if not by_discriminators:
            return f"by {NUMBERS} at temperature {self.options.judge_temperatures[0]:g} ({why})"
        at = " and ".join(f"{temperature:g}" for temperature in self.options.judge_temperatures)
        return f"at temperature {at}, by plain {NUMBERS} and by {why}"

    # ------------------------------------------------------------ running

    def run(self) -> int:
        """Everything that is left; returns the exit code. Refused with every problem that is seen before a stage
        starts."""
        check_writable(self.out, "--out")
        with only_run_in(self.out):
            for stage in self.options.stages:
                wait_until_left(run_folder(self.options, stage))
            found = self._look()
            if found.problems:
                raise Refused(found.problems)
            code = self._stages(found.looks)
            return code or self._results()

    def _stages(self, looks: list[Look]) -> int:
        for number, look in enumerate(looks, start=1):
            code = self._stage(number, look)
            if code:
                return code
        return OK

    def _stage(self, number: int, look: Look) -> int:
        """Run a stage's process; returns its exit code. Refused as `run`."""
        stage, state = look.stage, State(self.out)
        if look.models.pending:
            # What the stage before hands on is there now.
            now = Preflight(self.options, state)
            with _at_least(logging.ERROR):
                look = now.look_at(number)
            if now.problems:
                raise Refused(now.problems)
        if look.finished is not None:
            say(f"[{number}/{len(self.options.stages)}] {stage}: done, {look.finished} steps")
            return OK
        given = user_settings(self.options)[stage]
        for change in state.changes(stage, look.config, given):
            say(f"{stage} goes on otherwise than it was begun: {change}")
        say(headline(number, len(self.options.stages), look))
        state.begin(stage, look.config, given)
        code = self.processes.run("verl.trainer.main_ppo", *arguments_of(self.options, stage, look.models))
        if code == OK:
            state.finish(stage, tracked_step(run_folder(self.options, stage)))
        return code

    # ------------------------------------------------------------ afterwards

    def _results(self) -> int:
        """Merge, judge, report, and say what came of it."""
        now = Preflight(self.options, State(self.out))
        now.look_at(len(self.options.stages))
        students = self._merged(now.looks)
        trained, same = judged_once(students)
        for name, earlier in same.items():
            say(f"{name} left the student of {earlier} as it was, which is judged once")
        code, reports = (OK, {}) if self.options.no_judge else self._judge(now.looks, trained)
        if code:
            return code
        health = write_report(self.out, self.options.stages)
        folders = {student.name: student.folder for student in students}
        say(f"\n{conclude(self.options, folders, same, reports, health)}")
        return OK

    def _merged(self, looks: list[Look]) -> list[Student]:
        """Each stage's student."""
        students = []
        for look in looks:
            checkpoint = handed_on(run_folder(self.options, look.stage), look.config)
            trust = look.config.actor_rollout_ref.model.trust_remote_code
            folder, made = merge_student(self.out, look.stage, checkpoint, trust)
            says = f"merged {checkpoint.name} of {look.stage} into" if made else f"{look.stage} is merged:"
            say(f"{says} {self.out / STUDENTS / look.stage}")
            students.append(Student(look.stage, folder, content_of_model(str(folder))))
        return students

    def _judge(self, looks: list[Look], trained: list[Student]) -> tuple[int, dict[float, dict[str, Any]]]:
        """The judge's exit code, and its reports on base and students by temperature."""
        config, base = looks[-1].config, looks[0].config.actor_rollout_ref.model.path
        students = [Student(BASE, Path(base), content_of_model(base)), *trained]
        by_discriminators, _ = judges_by_discriminators(self.options, config, base)
        say(f"judging {len(students)} students: {self._judging(looks)}")
        reports = {}
        for temperature in self.options.judge_temperatures[: None if by_discriminators else 1]:
            code, report = judge(
                self.processes, self.out, config, students, base if by_discriminators else "",
                seeds=self.options.judge_seeds, temperature=temperature, memory=self.options.judge_memory,
            )  # fmt: skip
            if code and self.processes.received is None:
                say(JUDGE_FAILED)
            if code:
                return code, {}
            reports[temperature] = report
        return OK, reports


@contextmanager
def _at_least(level: int) -> Iterator[None]:
    """Within the block the log says nothing below this level."""
    logging.disable(level - 1)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
