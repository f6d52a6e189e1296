"""Rules: what is looked at, what is healthy, and what to do when it is not. They are data (`rules.yaml`), and a user's
file adds to them.

A rule's `value` is an expression (`expressions.py`), looked at after every step that logged something. Where it has
been outside the range of the present stage for `for` looks in a row the rule fires; after as many within the range it
is over.

A user's file has `rules`, a list. A rule with the id of a known one takes the fields that it gives and leaves the
others; `enabled: false` switches it off. `synonyms` are other names of metrics, by the name that the rules use.
"""

from __future__ import annotations

import difflib
import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from verl.monitor.expressions import LONGEST_WINDOW, Expression, ExpressionFault

OWN = Path(__file__).with_name("rules.yaml")
SYNONYMS = Path(__file__).with_name("synonyms.yaml")
Language = Literal["en", "zh"]
# What a step of a run may be: a stage of this trainer's, or RL without a discriminator.
Stage = Literal["SeqKD", "warmup", "GAD", "SODA", "RL"]


class RuleFault(ValueError):
    """A rule file that cannot be used, with everything that is wrong with it."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def _as_text(value: Any) -> Any:
    return {"en": value} if isinstance(value, str) else value


def _as_expression(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return Expression(value) if isinstance(value, str) else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, populate_by_name=False)


class TextIn(_Part):
    """A sentence in English and, unless it is a user's, in Chinese."""

    en: Annotated[str, Field(min_length=1)]
    zh: str | None = None

    def text(self, language: Language) -> str:
        return self.zh if language == "zh" and self.zh else self.en


Text = Annotated[TextIn, BeforeValidator(_as_text)]
Formula = Annotated[Expression, BeforeValidator(_as_expression)]
Bound = Annotated[float, Field(allow_inf_nan=False)] | None


class Range(_Part):
    """From `low` to `high`, both healthy; None: open."""

    low: Bound
    high: Bound

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2:
            return {"low": value[0], "high": value[1]}
        raise ValueError("not a list of two")

    @model_validator(mode="after")
    def _has_an_inside(self) -> Range:
        if self.low is None and self.high is None:
            raise ValueError("both ends are open")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("the first is above the second")
        return self

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class Cause(_Part):
    """Why a rule may fire; looked at only where `if` is true. `knob` is the setting to turn, `turn` says how."""

    text: Text
    condition: Annotated[Formula | None, Field(alias="if")] = None
    knob: str | None = None
    turn: Text | None = None


def _by_stage(value: Any) -> Any:
    return dict.fromkeys(Stage.__args__, value) if isinstance(value, list) else value


class Rule(_Part):
    """One thing that is looked at; fields as in the file, where `for_` is `for`.

    `label` names the value for people. `severity` "note" is something to know, not an alarm. `when`: the rule is looked
    at only where this is true. `after`: looks in a stage that pass before the first one counts. `explains`: rules whose
    alarms follow from this one's.
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    enabled: bool = True
    severity: Literal["alarm", "note"] = "alarm"
    label: Text
    value: Formula
    window: Annotated[int, Field(ge=1, le=LONGEST_WINDOW)] = 10
    healthy: Annotated[dict[Stage, Range], BeforeValidator(_by_stage), Field(min_length=1)]
    for_: Annotated[int, Field(alias="for", ge=1, le=LONGEST_WINDOW)] = 5
    after: Annotated[int, Field(ge=0)] = 0
    when: Formula | None = None
    says: Text
    causes: Annotated[list[Cause], Field(min_length=1)]
    explains: list[str] = []


@dataclass(frozen=True)
class Rules:
    """Rules in the order in which they are named, and the name that each synonym stands for."""

    rules: tuple[Rule, ...]
    synonyms: Mapping[str, str]


# What a field has to be, and an example of it: the words of a fault.
EXPECTED = {
    "id": ("a name of small letters, digits and _", "id: too_strong"),
    "enabled": ("true or false", "enabled: false"),
    "severity": ("alarm or note", "severity: alarm"),
    "label": ("a name for the value, or names in en and zh", "label: critic/d_acc"),
    "value": ("an expression", "value: median('critic/d_acc')"),
    "window": (f"a whole number from 1 to {LONGEST_WINDOW}", "window: 10"),
    "healthy": (
        "[lowest, highest] with null for an open end, or such a list by stage (" + ", ".join(Stage.__args__) + ")",
        "healthy: {GAD: [null, 0.9]}",
    ),
    "for": (f"a whole number from 1 to {LONGEST_WINDOW}", "for: 5"),
    "after": ("a whole number from 0", "after: 10"),
    "when": ("an expression", "when: has('critic/d_acc')"),
    "says": ("a text, or texts in en and zh", "says: the discriminator wins"),
    "causes": (
        "a list of causes, each with text and, if needed, if, knob and turn",
        "causes: [{text: too fast, knob: critic.optim.lr, turn: lower it}]",
    ),
    "explains": ("a list of ids of rules", "explains: [answers_cut]"),
}


def load_rules(file: str | Path | None = None) -> Rules:
    """The rules of this package, with those of a user's file.

    Raises:
        RuleFault: the file is missing or wrong; lists everything that is.
    """
    own = _read(OWN)
    merged = {rule["id"]: rule for rule in own["rules"]}
    known, sources = list(merged), dict.fromkeys(merged, str(OWN))
    synonyms = dict(yaml.safe_load(SYNONYMS.read_text(encoding="utf-8")))
    problems: list[str] = []
    if file is not None:
        path = Path(file).expanduser()
        content = _read(path)
        problems += _faults_of_content(content, path)
        if problems:
            raise RuleFault(problems)
        for number, rule in enumerate(content.get("rules") or [], start=1):
            name = str(rule.get("id", f"number {number}"))
            sources[name] = str(path)
            merged[name] = {**merged.get(name, {}), **rule}
        for name, others in (content.get("synonyms") or {}).items():
            synonyms[name] = [*synonyms.get(name, []), *others]
    rules = []
    for name, raw in merged.items():
        try:
            rules.append(Rule.model_validate(raw))
        except ValidationError as error:
            problems += [f"{sources[name]}: rule {name}: {fault}" for fault in _faults(error, name, known)]
    problems += _faults_of_links({name: raw.get("explains") or [] for name, raw in merged.items()}, sources)
    if problems:
        raise RuleFault(problems)
    by_synonym = {other: name for name, others in synonyms.items() for other in others}
    return Rules(tuple(rule for rule in rules if rule.enabled), by_synonym)


def _faults_of_links(links: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with which alarms follow from which, by rule."""
    links = {name: [str(other) for other in others] for name, others in links.items() if isinstance(others, list)}
    for name, others in links.items():
        unknown = [other for other in others if other not in sources]
        if unknown:
            yield (
                f"{sources[name]}: rule {name}: explains: expected ids of rules ({', '.join(sources)}), got "
                f"{', '.join(unknown)}; fix: name one of these"
            )
    try:
        graphlib.TopologicalSorter(links).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        changed = next(name for name in error.args[1] if sources[name] != str(OWN))
        yield f"{sources[changed]}: explains: expected no circle, got {circle}; fix: take one of these out"


class _NoDuplicates(yaml.SafeLoader):
    """YAML in which a key that is written twice is a fault; the language takes the second one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    """A YAML file's content; RuleFault where it is none."""
    example = "fix: write a list of rules under the key rules, as in verl/monitor/rules.yaml"
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicates)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RuleFault(
            [f"{path}: expected a YAML file of rules, got: {reason}; fix: name a file that can be read"]
        ) from error
    except UnicodeDecodeError as error:
        raise RuleFault(
            [f"{path}: expected UTF-8, got byte {error.start}: {error.reason}; fix: save it as UTF-8"]
        ) from error
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        where = " ".join(str(error).split()) or "nested too deep"
        raise RuleFault([f"{path}: expected YAML, got {where}; {example}"]) from error


def _faults_of_content(content: Any, path: Path) -> list[str]:
    """What is wrong with a user's file as a whole."""
    if not isinstance(content, dict) or not content or set(content) - {"rules", "synonyms"}:
        got = f"{content!r:.80}"
        return [f"{path}: expected the keys rules, synonyms or both, got {got}; fix: put the list under rules:"]
    problems = []
    rules, synonyms = content.get("rules") or [], content.get("synonyms") or {}
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        problems.append(f"{path}: rules: expected a list of rules, got {rules!r:.80}; fix: begin each with - id: NAME")
    else:
        names = [str(rule["id"]) for rule in rules if "id" in rule]
        problems += [
            f"{path}: rule {name}: expected one rule of this id, got several; fix: rename or join them"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
    lists = isinstance(synonyms, dict) and all(isinstance(others, list) for others in synonyms.values())
    if not lists or not all(isinstance(name, str) for others in synonyms.values() for name in others):
        problems.append(
            f"{path}: synonyms: expected lists of names by metric, got {synonyms!r:.80}; fix: write "
            "critic/d_acc: [my_acc]"
        )
    return problems


def _faults(error: ValidationError, name: str, known: list[str]) -> Iterator[str]:
    """A sentence for each field that is wrong: what was expected, what is there, and how to mend it. `known` are the
    ids of this package's rules, of which a new one may be a misspelling."""
    fields: dict[str, Mapping[str, Any]] = {}
    for item in error.errors():
        fields.setdefault(str(item["loc"][0]), item)
    missing = [key for key, item in fields.items() if item["type"] == "missing" and len(item["loc"]) == 1]
    if missing:
        meant = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {meant[0]}?" if meant else "give them"
        got = f"no {', '.join(missing)}"
        yield f"expected the id of a known rule, or all fields of a new one, got {got}; fix: {hint}"
    for key, item in fields.items():
        where = ".".join(str(part) for part in item["loc"] if part not in ("TextIn", "Expression"))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ExpressionFault):
            yield f"{where}: {cause}"
        elif key not in EXPECTED:
            yield f"{where}: expected one of {', '.join(EXPECTED)}, got {key}; fix: correct its name or leave it out"
        elif key not in missing:
            expected, example = EXPECTED[key]
            yield f"{where}: expected {expected}, got {_shown(item)}; fix: write for example {example}"


def _shown(item: Mapping[str, Any]) -> str:
    if item["type"] == "missing":
        return f"none of the name {item['loc'][-1]}"
    if item["type"] == "extra_forbidden":
        return f"the unknown name {item['loc'][-1]}"
    reason = f" ({item['ctx']['error']})" if item["type"] == "value_error" else ""
    return f"{item['input']!r:.100}{reason}"
