"""Files of rules: what a user's adds, and what is said of a wrong one; the document's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_config import REQUIRED
from verl.monitor.expressions import look_up
from verl.monitor.rules import RuleFault, load_rules
from verl.monitor.table import BEGIN, END, markdown
from verl.trainer.config import ConfigError, compose_config
from verl.trainer.config.loading import known_keys

NEW = """
- id: mine
  label: my metric
  value: median('my/metric')
  healthy: {GAD: [null, 1e-3]}
  says: it is high
  causes: [{text: a reason}]
"""


def load(folder, text, encoding="utf-8"):
    file = folder / "rules.yaml"
    file.write_bytes(text.encode(encoding))
    return load_rules(file)


def by_id(rules):
    return {rule.id: rule for rule in rules.rules}


def test_a_users_file_adds_changes_and_switches_off(tmp_path):
    own = by_id(load_rules())
    text = (
        "rules:\n- {id: discriminator_too_strong, healthy: {GAD: [null, 0.8]}}\n- {id: answers_cut, enabled: false}\n"
    )
    found = load(tmp_path, text + NEW + "synonyms: {critic/d_acc: [my/acc]}\n")
    rules = by_id(found)
    assert set(rules) == set(own) - {"answers_cut"} | {"mine"}
    changed, before = rules["discriminator_too_strong"], own["discriminator_too_strong"]
    assert changed.healthy["GAD"].high == 0.8 and set(changed.healthy) == {"GAD"}
    assert (changed.says, changed.for_, changed.value.text) == (before.says, before.for_, before.value.text)
    assert rules["mine"].healthy["GAD"].high == 1e-3, "which YAML takes for a text"
    assert found.synonyms["my/acc"] == found.synonyms["discriminator/acc"] == "critic/d_acc"


def test_texts_in_chinese(tmp_path):
    chinese = NEW.replace("it is high", "{en: high, zh: 过高}").replace("a reason", "原因")
    rule = by_id(load(tmp_path, "rules:" + chinese))["mine"]
    assert (rule.says.text("zh"), rule.says.text("en")) == ("过高", "high")
    assert rule.causes[0].text.text("en") == "原因", "one text is for both"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the keys rules, synonyms or both"),
        ("rules: 3", "rules: expected a list of rules, got 3"),
        ("- id: x", "the keys rules, synonyms or both"),
        ("rule:\n- id: x", "the keys rules, synonyms or both"),
        ("rules: [", "expected YAML"),
        ("rules:\n- id: a\n  id: b", "'id' is written twice"),
        ("rules:" + NEW + NEW, "rule mine: expected one rule of this id, got several"),
        ("rules:" + NEW.replace("value: median('my/metric')", "value: median(x)"), "value: expected median('METRIC'"),
        ("rules:" + NEW.replace("median('my/metric')", "__import__('os')"), "got \"__import__('os')\""),
        ("rules:" + NEW.replace("[null, 1e-3]", "[1, 0]"), "healthy.GAD: expected [lowest, highest]"),
        ("rules:" + NEW.replace("[null, 1e-3]", "[null, null]"), "healthy.GAD: expected [lowest, highest]"),
        ("rules:" + NEW.replace("[null, 1e-3]", "0.5"), "healthy.GAD: expected [lowest, highest]"),
        ("rules:" + NEW.replace("GAD:", "gad:"), "expected [lowest, highest]"),
        ("rules:" + NEW + "  window: 0", "window: expected a whole number from 1 to 1000, got 0"),
        ("rules:" + NEW + "  windw: 3", "windw: expected one of id, enabled"),
        ("rules:" + NEW + "  severity: fatal", "severity: expected alarm or note, got 'fatal'"),
        ("rules:" + NEW + "  explains: [no_such]", "explains: expected ids of rules"),
        ("rules:" + NEW + "  explains: [mine]", "explains: expected no circle, got mine -> mine"),
        ("rules:" + NEW + "  causes: []", "written twice"),
        ("rules:" + NEW.replace("[{text: a reason}]", "[]"), "causes: expected a list of causes"),
        ("rules:" + NEW.replace("{text: a reason}", "{txt: a}"), "causes.0.text: expected a list of causes"),
        ("rules:" + NEW.replace("text: a reason", "text: a, if: 'x y'"), "expected an expression such as"),
        ("rules:\n- {id: discriminator_to_strong, window: 3}", "did you mean discriminator_too_strong?"),
        ("rules:\n- {window: 3}", "rule number 1: expected the id of a known rule, or all fields"),
        ("rules:\n- {id: [a], window: 3}", "id: expected a name of small letters"),
        ("rules:\n- {id: on}", "id: expected a name of small letters"),
        ("synonyms: {critic/d_acc: mine}", "synonyms: expected lists of names by metric"),
        ("synonyms: [a]", "synonyms: expected lists of names by metric"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, expected):
    with pytest.raises(RuleFault) as error:
        load(tmp_path, text)
    assert expected in str(error.value)
    for problem in error.value.problems:
        assert problem.startswith(str(tmp_path / "rules.yaml"))
        assert all(word in problem for word in ("expected", "got", "fix")), problem


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RuleFault, match=r"expected UTF-8, got byte .*; fix: save it as UTF-8"):
        load(tmp_path, "rules:" + NEW.replace("it is high", "过高"), encoding="gbk")
    with pytest.raises(RuleFault, match="got: No such file or directory; fix"):
        load_rules(tmp_path / "none.yaml")
    with pytest.raises(RuleFault, match="got: Is a directory; fix"):
        load_rules(tmp_path)


def test_everything_is_listed_before_a_run_starts(tmp_path):
    (tmp_path / "rules.yaml").write_text("rules:\n- {id: answers_cut, window: no}\n- {id: over_fitted, for: -1}\n")
    with pytest.raises(ConfigError) as error:
        compose_config([*REQUIRED, f"trainer.monitor_rules={tmp_path}/rules.yaml", "algorithm.gamma=0.5"])
    assert len(error.value.problems) == 3
    first, second = (problem for problem in error.value.problems if "monitor_rules" in problem)
    assert "rule answers_cut: window: expected a whole number from 1 to 1000, got False" in first
    assert "rule over_fitted: for: expected a whole number from 1 to 1000, got -1" in second


def test_every_setting_that_rules_name_exists():
    known = set(known_keys())
    knobs = {cause.knob for rule in load_rules().rules for cause in rule.causes}
    assert knobs - known == set()


def test_every_text_of_the_own_rules_is_there_in_chinese():
    for rule in load_rules().rules:
        texts = [
            rule.says,
            *(cause.text for cause in rule.causes),
            *(cause.turn for cause in rule.causes if cause.turn),
        ]
        assert all(text.zh for text in texts), rule.id


@pytest.mark.parametrize(("language", "folder"), [("en", "docs"), ("zh", "docs/zh")])
def test_the_documents_table_is_that_of_the_rules(language, folder):
    document = (Path(__file__).parents[2] / folder / "monitor.md").read_text(encoding="utf-8")
    assert document.partition(BEGIN[language])[2].partition(END)[0].strip() == markdown(load_rules(), language)


def test_settings_are_found_nested_and_flat():
    assert look_up({"a": {"b": 1}}, "a.b") == look_up({"a.b": 1}, "a.b") == 1
    for key in ("a.c", "a.b.c", "x"):
        with pytest.raises(KeyError):
            look_up({"a": {"b": 1}}, key)
