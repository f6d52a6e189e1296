"""The monitor of a run that trains: it looks on, says what it sees, and may ask for an end.

It never ends or holds up a run by a fault of its own: whatever goes wrong in it is said once, and it is off from there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from verl.monitor.reading import SETTINGS_FILE, NotARun, read_run
from verl.monitor.rules import load_rules
from verl.monitor.verdict import Words
from verl.monitor.watch import Event, Watch
from verl.utils.tracking import Tracking

logger = logging.getLogger(__name__)

OnAlarm = Literal["warn", "stop", "off"]
# A look takes about a millisecond. One that takes so many seconds is counted, and with the third the monitor is off.
SLOW_S = 1.0
SLOW_LOOKS = 3


class StoppedByAlarm(RuntimeError):
    """The run has ended because of an alarm, its weights saved (`trainer.on_alarm=stop`). The message says why."""

    exit_code = 3


class Monitor:
    """Watches a run's steps as they are logged.

    Args:
        settings: the run's, nested. They are kept as `settings.json` in `folder`, for looks at the run afterwards.
        folder: the run's.
        tracking: gets alarms beside the console; its metrics.jsonl, if there is one, has the steps before this start.
        first_step: the step that the run goes on with.
        rules_file: a user's rules.
        on_alarm: "warn" says so; "stop" asks for the run's end too, by `stopped`; "off" does nothing at all.

    `stopped` is the sentence that the run is to end with, once an alarm has begun.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: Path,
        tracking: Tracking,
        first_step: int,
        rules_file: str | None,
        on_alarm: OnAlarm,
    ):
        self.tracking = tracking
        self.stops = on_alarm == "stop"
        self.stopped: str | None = None
        self.watch: Watch | None = None
        self._slow = 0
        if on_alarm == "off":
            return
        try:
            self.watch = Watch(load_rules(rules_file), settings)
            _keep_settings(settings, folder)
            self._catch_up(first_step, tracking.metrics_file)
        except Exception as error:
            self._off(error)

    def _catch_up(self, first_step: int, file: Path | None) -> None:
        """See the steps that a resumed run has behind it, without a word: what fires already has been said."""
        if first_step == 0 or file is None or not file.is_file():
            return
        try:
            earlier = read_run(file, only=self.watch.read | self.watch.synonyms.keys())
        except (OSError, NotARun) as error:
            logger.warning("the health monitor cannot look at the steps before this start: %s", error)
            return
        for step, data in earlier.steps.items():
            if step < first_step:
                self.watch.see(step, data)

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step that was logged."""
        if self.watch is None:
            return
        start = time.perf_counter()
        try:
            for event in self.watch.see(step, metrics):
                self._tell(event)
        except Exception as error:
            return self._off(error)
        self._slow += time.perf_counter() - start > SLOW_S
        if self._slow >= SLOW_LOOKS:
            self._off(f"it took more than {SLOW_S:.0f} s for the {SLOW_LOOKS}rd time")

    def _tell(self, event: Event) -> None:
        words = Words(self.watch)
        if event.alarm.is_note:
            if event.begins:
                logger.info("%s", words.note(event))
            return
        line = words.event(event)
        logger.warning("%s", line)
        if not event.begins:
            return
        if self.stops and self.stopped is None:
            self.stopped = words.stopped(event.alarm, event.step)
        try:
            self.tracking.alert(event.alarm.rule.id, line, event.step)
        except Exception as error:
            logger.warning("the alarm could not be sent to a tracker (%s: %s)", type(error).__name__, error)

    def _off(self, reason: Exception | str) -> None:
        what = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        logger.warning("the health monitor is off from here (%s); the run goes on without it", what)
        self.watch = None


def _keep_settings(settings: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(settings, indent=1, ensure_ascii=False, default=str)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        logger.warning("%s could not be written: %s", folder / SETTINGS_FILE, error)
