"""Alarms in words, in English and Chinese (`texts.yaml`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from verl.monitor.expressions import Unknown
from verl.monitor.rules import Cause, Language, Range, Rule
from verl.monitor.series import Run
from verl.monitor.watch import Alarm, Event, Watch, source_of


@cache
def _texts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))


class Words:
    """Sentences about what a watch has seen, in one language."""

    def __init__(self, watch: Watch, language: Language = "en"):
        self.watch = watch
        self.language = language

    def say(self, name: str, /, **values: Any) -> str:
        return _texts()[self.language][name].format(**values)

    # ------------------------------------------------------------ parts

    def knob(self, cause: Cause, is_note: bool = False) -> str:
        """What to turn, with the value that it has; empty where there is nothing. A note names it and asks for
        nothing."""
        if cause.knob is None:
            return ""
        known, now = self.watch.setting(cause.knob)
        turn = "" if cause.turn is None else cause.turn.text(self.language)
        name = ("note_knob" if is_note else "knob") + ("_now" if known else "")
        return self.say(name, knob=cause.knob, now=now, turn=turn)

    def facts(self, alarm: Alarm) -> dict[str, Any]:
        """What sentences about an alarm are filled with."""
        first = alarm.causes[0]
        return {
            "id": alarm.rule.id,
            "says": alarm.rule.says.text(self.language),
            "label": self._label(alarm.rule),
            "value": _figure(alarm.value),
            "range": shown_range(alarm.healthy, self.language),
            "since": alarm.since,
            "cause": first.text.text(self.language),
            "knob": self.knob(first, alarm.is_note),
        }

    def _label(self, rule: Rule) -> str:
        """In Chinese a blank follows Latin letters, and no Chinese ones."""
        label = rule.label.text(self.language)
        return f"{label} " if self.language == "zh" and label[-1].isascii() else label

    # ------------------------------------------------------------ live

    def event(self, event: Event) -> str:
        """One line: an alarm begins, or is over."""
        alarm = event.alarm
        if not event.begins:
            return self.say("ends", step=event.step, id=alarm.rule.id, since=alarm.since, until=alarm.until)
        return self.say("begins", step=event.step, follows=self.follows(alarm), **self.facts(alarm))

    def note(self, event: Event) -> str:
        return self.say("note", step=event.step, **self.facts(event.alarm))

    def follows(self, alarm: Alarm) -> str:
        source = source_of(alarm, self.watch.firing)
        return "" if source is None else self.say("follows", id=source.rule.id)

    def stopped(self, alarm: Alarm, step: int) -> str:
        return self.say("stopped", step=step, **self.facts(alarm))

    # ------------------------------------------------------------ afterwards

    def verdict(self, run: Run) -> str:
        """One sentence: healthy, or the first alarm with its first cause."""
        firing = self.watch.firing
        if firing:
            return self.say("unhealthy", step=self.watch.step, **self.facts(firing[0]))
        stages = self.say("list_comma").join(dict.fromkeys(self.watch.stages)) or "?"
        earlier = sum(not alarm.is_note for alarm in self.watch.alarms)
        name = "blind" if self.watch.judged_nothing else "recovered" if earlier else "healthy"
        return self.say(name, steps=run.made, stages=stages, count=earlier)

    def report(self, run: Run, verbose: bool = False) -> str:
        """The verdict, then every alarm with its causes; with `verbose` also the rules that had no value."""
        lines = [self.verdict(run)]
        over = [alarm for alarm in self.watch.alarms if alarm.until is not None and not alarm.is_note]
        for title, alarms in (("alarms", self.watch.firing), ("over", over), ("notes", self.watch.notes)):
            if alarms:
                lines += ["", self.say(title), *(line for alarm in alarms for line in self._alarm(alarm))]
        if verbose:
            lines += ["", self.say("silent")]
            lines += [self._silent(name, unknown) for name, unknown in self.watch.unknown.items()]
            lines.append(self.say("metrics", count=len(run.metrics - self.watch.read)))
        return "\n".join(lines)

    def _silent(self, rule: str, unknown: Unknown) -> str:
        return self.say("silent_line", id=rule, reason=self.say(f"unknown_{unknown.reason}", **unknown.facts))

    def _alarm(self, alarm: Alarm) -> list[str]:
        until = self.say("now") if alarm.until is None else self.say("until_step", step=alarm.until)
        follows = self.follows(alarm) if alarm.until is None and not alarm.is_note else ""
        kind = "note_line" if alarm.is_note else "alarm_line"
        lines = [self.say(kind, until=until, **self.facts(alarm)) + follows]
        for number, cause in enumerate(alarm.causes, start=1):
            text = cause.text.text(self.language)
            lines.append(self.say("cause_line", number=number, cause=text, knob=self.knob(cause, alarm.is_note)))
        return lines


def shown_range(healthy: Range, language: Language) -> str:
    """A range in words."""
    name = "below" if healthy.low is None else "above" if healthy.high is None else "between"
    return _texts()[language][name].format(low=_figure(healthy.low), high=_figure(healthy.high))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
