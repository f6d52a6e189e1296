"""Rules, looked at step by step: which fire, since when, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from verl.monitor.expressions import Expression, Facts, Unknown, look_up
from verl.monitor.rules import Cause, Range, Rule, Rules
from verl.monitor.series import Run, Series, as_number


@dataclass
class Alarm:
    """A rule that fires, or fired. Steps: `since` the value has been outside `healthy`, `fired` when that was said,
    `until` the last one before it was over (None: it is not). `value` is the latest one that was outside; `causes` are
    those whose condition held when it fired, in order."""

    rule: Rule
    healthy: Range
    since: int
    fired: int
    value: float
    causes: list[Cause]
    until: int | None = None

    @property
    def is_note(self) -> bool:
        return self.rule.severity == "note"


@dataclass(frozen=True)
class Event:
    """An alarm begins or, if its `until` is set, is over at a step."""

    step: int
    alarm: Alarm

    @property
    def begins(self) -> bool:
        return self.alarm.fired == self.step


@dataclass
class _State:
    """How a rule has stood in the latest looks at it."""

    looks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    outside: int = 0
    inside: int = 0
    since: int = 0
    last_outside: int = 0
    alarm: Alarm | None = None


def stage_of(data: Mapping[str, Any], actor_trained: bool, before: str | None) -> str | None:
    """What a step with these metrics belongs to; `before` where they do not say. A discriminator's stage is GAD from
    the first step on that trained the actor on its scores."""
    if "actor/soda_loss" in data:
        return "SODA"
    if "critic/d_acc" in data:
        return "GAD" if actor_trained else "warmup"
    if "actor/pg_loss" in data or "critic/zero_std_group_frac" in data:
        return "RL"
    return "SeqKD" if "actor/sft_loss" in data else before


class Watch:
    """Takes in a run's steps in order, and says which rules begin and cease to fire.

    Args:
        rules: those to look at.
        settings: the run's, nested, for the conditions of causes; empty where they are unknown.

    `alarms` are all so far. `unknown` has, for each rule that never had a value, the reason. `stages` are those seen,
    in order, and `read` the metrics that rules may read.
    """

    def __init__(self, rules: Rules, settings: Mapping[str, Any] | None = None):
        self.rules = rules.rules
        self.synonyms = rules.synonyms
        self.settings = settings or {}
        self.alarms: list[Alarm] = []
        self.unknown = {rule.id: Unknown("no_step") for rule in self.rules}
        self.stages: list[str] = []
        self.step: int | None = None
        self._metrics: dict[str, Series] = {}
        self._new: Set[str] = set()
        self._states = {rule.id: _State() for rule in self.rules}
        parts = [part for rule in self.rules for part in (rule.value, rule.when, *(c.condition for c in rule.causes))]
        self.read = {name for part in parts if part is not None for name in part.metrics} | {"actor/pg_loss"}

    def see(self, step: int, data: Mapping[str, Any]) -> list[Event]:
        """The next step; what has changed with it. A step that is not above all before is refused with ValueError."""
        if self.step is not None and step < self.step:
            raise ValueError(f"step {step} after step {self.step}")
        self.step = step
        named = self._by_own_names(data)
        self._new = named.keys()
        for name, value in named.items():
            if name in self.read:
                self._metrics.setdefault(name, Series()).add(step, value)
        stage = stage_of(named, "actor/pg_loss" in self._metrics, self.stage)
        if stage is not None and stage != self.stage:
            self.stages.append(stage)
        return [event for rule in self.rules if (event := self._look(rule, step)) is not None]

    @property
    def stage(self) -> str | None:
        """The present one; None before any metric says."""
        return self.stages[-1] if self.stages else None

    def _by_own_names(self, data: Mapping[str, Any]) -> dict[str, float]:
        """Numbers, by the names that rules use; a synonym counts where the name itself is not there."""
        numbers = {name: number for name, value in data.items() if (number := as_number(value)) is not None}
        return {self.synonyms.get(name, name): number for name, number in numbers.items()} | numbers

    def _look(self, rule: Rule, step: int) -> Event | None:
        healthy = rule.healthy.get(self.stage)
        state = self._states[rule.id]
        if healthy is None:
            return self._end(state, step) if state.alarm is not None else None
        facts = Facts(self._metrics, self.settings, step, rule.window)
        try:
            if rule.when is not None and not rule.when(facts):
                raise Unknown("not_asked", condition=rule.when.text)
            value = _as_float(rule.value, facts)
        except Unknown as reason:
            if rule.id in self.unknown:
                self.unknown[rule.id] = reason
            return None
        self.unknown.pop(rule.id, None)
        if rule.value.metrics and not self._new & set(rule.value.metrics):
            return None  # A row of other metrics is no further look at these.
        state.looks[self.stage] += 1
        if state.looks[self.stage] <= rule.after:
            return None
        if healthy.holds(value):
            return self._within(rule, state, step)
        return self._outside(rule, state, step, value, healthy, facts)

    def _outside(
        self, rule: Rule, state: _State, step: int, value: float, healthy: Range, facts: Facts
    ) -> Event | None:
        if state.outside == 0:
            state.since = step
        state.outside, state.inside, state.last_outside = state.outside + 1, 0, step
        if state.alarm is not None:
            state.alarm.value = value
        elif state.outside >= rule.for_:
            causes = [cause for cause in rule.causes if _applies(cause.condition, facts)] or [rule.causes[-1]]
            state.alarm = Alarm(rule, healthy, state.since, step, value, causes)
            self.alarms.append(state.alarm)
            return Event(step, state.alarm)
        return None

    def _within(self, rule: Rule, state: _State, step: int) -> Event | None:
        state.inside += 1
        if state.alarm is None:
            state.outside = 0
        elif state.inside >= rule.for_:
            return self._end(state, step)
        return None

    def _end(self, state: _State, step: int) -> Event:
        alarm, state.alarm, state.outside, state.inside = state.alarm, None, 0, 0
        alarm.until = state.last_outside
        return Event(step, alarm)

    @property
    def firing(self) -> list[Alarm]:
        """Alarms, without notes, that fire now: first those that follow from no other, in the order of the rules."""
        now = [alarm for alarm in self.alarms if alarm.until is None and not alarm.is_note]
        order = {rule.id: number for number, rule in enumerate(self.rules)}
        return sorted(now, key=lambda alarm: (source_of(alarm, now) is not None, order[alarm.rule.id]))

    @property
    def notes(self) -> list[Alarm]:
        """Notes that hold now."""
        return [alarm for alarm in self.alarms if alarm.until is None and alarm.is_note]

    @property
    def judged_nothing(self) -> bool:
        """Whether no rule has had a value."""
        return len(self.unknown) == len(self.rules)

    def has(self, name: str) -> bool:
        """Whether a metric that rules read has been seen."""
        return name in self._metrics

    def series(self, run: Run, name: str) -> Series:
        """A run's metric by the name that rules use, from a synonym where the name itself was not logged."""
        others = [other for other, own in self.synonyms.items() if own == name]
        found = (run.series(candidate) for candidate in (name, *others))
        return next((series for series in found if series.values), Series())

    def setting(self, key: str) -> tuple[bool, Any]:
        """Whether a setting is known, and its value."""
        try:
            return True, look_up(self.settings, key)
        except KeyError:
            return False, None


def source_of(alarm: Alarm, alarms: Iterable[Alarm]) -> Alarm | None:
    """The first of these that the alarm follows from."""
    return next((other for other in alarms if alarm.rule.id in other.rule.explains), None)


def _applies(condition: Expression | None, facts: Facts) -> bool:
    """Whether a cause is to be thought of; one whose condition cannot be told is not."""
    if condition is None:
        return True
    try:
        return bool(condition(facts))
    except Unknown:
        return False


def _as_float(formula: Expression, facts: Facts) -> float:
    """A formula's value; Unknown where that is no number, as a setting may be a text or null."""
    value = formula(facts)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Unknown("no_number", text=formula.text, value=repr(value)) from None


def replay(run: Run, rules: Rules) -> Watch:
    """A run's steps, all seen."""
    watch = Watch(rules, run.settings)
    for step, data in run.steps.items():
        watch.see(step, data)
    return watch
