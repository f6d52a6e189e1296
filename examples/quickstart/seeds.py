"""The quick start from several seeds: how its grades vary, and whether the health monitor raises an alarm in any stage.

    python -m examples.quickstart.seeds --seeds 20 --out outputs/seeds --jobs 16

Each seed has a world, data and base student of its own (`run.py --seed`), in `OUT/seed_N`, and prints into
`OUT/seed_N.log`. Its processes, one per rank and the driver, compute with one thread each, so that a job takes as many
cores as it has ranks. The same command goes on where an earlier one was ended: finished seeds are kept, and the rules
of today look at them. The table is printed at the end, and kept in `OUT/seeds.txt` from the first finished seed on.

exit codes: 0 no alarm; 1 an alarm in some stage, over by the end or not; 2 a seed failed
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from examples.quickstart.run import REPOSITORY, RESULTS, STAGES
from verl.monitor.reading import read_run
from verl.monitor.rules import load_rules
from verl.monitor.watch import Alarm, replay
from verl.utils.console import printable

NO_ALARM, ALARMS, FAILED = 0, 1, 2
STUDENTS = ("base", *(stage.name for stage in STAGES))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
# Ray takes this share of the machine's memory for objects that the ranks send each other, which are small here.
OBJECT_STORE = {"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01"}


@dataclass(frozen=True)
class Outcome:
    """A seed's grades by student, as `run.py` leaves them, and each stage's alarms; both empty until it is finished."""

    seed: int
    grades: dict[str, dict[str, Any]]
    alarms: dict[str, list[Alarm]]

    @property
    def unfinished(self) -> bool:
        return not self.grades


class Jobs:
    """Quick starts in processes of their own, in process groups that are ended together."""

    def __init__(self, out: Path, arguments: Sequence[str]):
        self.out = out
        self.arguments = arguments
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, seed: int) -> None:
        """Run a seed to its end, unless it is finished already."""
        folder = self.out / f"seed_{seed}"
        if self._ended or _grades(folder):
            return
        command = [sys.executable, "-m", "examples.quickstart.run", "--out", str(folder), "--seed", str(seed)]
        with (self.out / f"seed_{seed}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *self.arguments], cwd=REPOSITORY, env=os.environ | ONE_THREAD | OBJECT_STORE,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        print(f"seed {seed}: " + ("done" if code == 0 else f"exit code {code}, see {folder}.log"), flush=True)

    @contextmanager
    def ended_with_us(self) -> Iterator[None]:
        """Within the block, what ends this process ends the jobs first; a trainer takes the signal as a user's."""
        try:
            yield
        except BaseException:
            self._ended = True
            for process in list(self._running):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            raise


def outcome(out: Path, seed: int) -> Outcome:
    """What a seed has come to."""
    folder = out / f"seed_{seed}"
    grades, rules = _grades(folder), load_rules()
    alarms = {}
    for stage in STAGES if grades else ():
        watch = replay(read_run(folder / "checkpoints" / "gad" / stage.name), rules)
        alarms[stage.name] = [alarm for alarm in watch.alarms if not alarm.is_note]
    return Outcome(seed, grades, alarms)


def _grades(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a finished quick start, else none."""
    try:
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per seed with its shares of exact answers and its alarms; then means, gains and a count of the alarms."""
    lines = [f"{'seed':>6} " + " ".join(f"{name:>7}" for name in STUDENTS) + "  alarms (exact answers on the left)"]
    for one in outcomes:
        exact = " ".join(f"{one.grades[name]['exact']:7.1%}" for name in STUDENTS if not one.unfinished)
        said = [_said(stage, alarm) for stage, alarms in one.alarms.items() for alarm in alarms]
        lines.append(f"{one.seed:6} {exact}  {', '.join(said) or '-'}" if exact else f"{one.seed:6} not finished")
    whole = [one for one in outcomes if not one.unfinished]
    if len(whole) > 1:
        exact = {name: [one.grades[name]["exact"] for one in whole] for name in STUDENTS}
        means = " ".join(f"{statistics.mean(values):7.1%}" for values in exact.values())
        lines += [f"{'mean':>6} {means}", "", *(_gain(*pair, exact) for pair in pairwise(STUDENTS))]
    return "\n".join([*lines, "", _count(whole)])


def _said(stage: str, alarm: Alarm) -> str:
    until = "the end" if alarm.until is None else alarm.until
    return f"{stage}: {alarm.rule.id} from step {alarm.since} to {until} ({alarm.value:.3g})"


def _gain(before: str, after: str, exact: dict[str, list[float]]) -> str:
    """What a stage has gained over the student that it began with, seed by seed."""
    gains = [new - old for old, new in zip(exact[before], exact[after], strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return (
        f"{after} gains {100 * statistics.mean(gains):+.1f} points of exact answers over {before} "
        f"(standard error {100 * error:.1f}, {len(gains)} seeds)"
    )


def _count(whole: Sequence[Outcome]) -> str:
    rules = Counter(alarm.rule.id for one in whole for alarms in one.alarms.values() for alarm in alarms)
    hit = sum(bool(alarms) for one in whole for alarms in one.alarms.values())
    named = "".join(f", {rule} {count} times" for rule, count in rules.most_common())
    return f"alarms in {hit} of {sum(len(one.alarms) for one in whole)} stages{named}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that are not finished, then print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for all seeds")
    parser.add_argument("--seeds", type=int, default=20, help="how many, from 0 (default: 20)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, each on as many cores as it has ranks")
    parser.add_argument("--ranks", type=int, default=2, help="training processes of a job (default: 2)")
    parser.add_argument("--steps", type=int, help="of each stage, instead of its own number")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    steps = [] if options.steps is None else ["--steps", str(options.steps)]
    # Ray starts a process for every CPU that it is told of.
    jobs = Jobs(out, [*steps, "--ranks", str(options.ranks), f"ray_kwargs.ray_init.num_cpus={options.ranks}"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seeds = range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool, jobs.ended_with_us():
        for job in as_completed([pool.submit(jobs.run, seed) for seed in seeds]):
            job.result()
            outcomes = [outcome(out, seed) for seed in seeds]
            (out / "seeds.txt").write_text(table(outcomes) + "\n", encoding="utf-8")
    print(printable(table(outcomes)))
    if any(one.unfinished for one in outcomes):
        return FAILED
    return ALARMS if any(alarms for one in outcomes for alarms in one.alarms.values()) else NO_ALARM


if __name__ == "__main__":
    sys.exit(main())
