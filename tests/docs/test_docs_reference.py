"""docs/reference: what is made from the code is up to date, complete, and true of it."""

from __future__ import annotations

import ast
import gzip
import json
import re
from functools import cache, reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml

from docs_site import generate, metrics, models, settings
from docs_site.yaml_comments import entries
from tests.e2e import metric_names
from verl.trainer.config.loading import composed_preset, known_keys

ROOT = Path(__file__).parents[2]


def test_the_pages_are_up_to_date():
    assert generate.problems() == []
    assert generate.stale() == [], "python -m docs_site.generate"


def test_a_page_that_was_changed_by_hand_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "FOLDERS", {"en": tmp_path / "en", "zh": tmp_path / "zh"})
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    page = tmp_path / "en" / "settings.md"
    page.write_text(page.read_text().replace("Default", "Usually", 1))
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    assert "en/settings.md is not up to date" in capsys.readouterr().err


# ---- settings


def test_comments_are_read_where_they_stand(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# Of the file.\na: 1  # behind\n# above,\n# twice\nb:  # of the group\n  c: [x, '#']  # in it\n\n"
        "# of nothing\n\n  # above\n  d: ${a}  # and behind\ne: {}\n"
    )
    assert [(".".join(entry.path), entry.value, entry.comment) for entry in entries(file)] == [
        ("a", "1", "behind"),
        ("b", None, "above, twice of the group"),
        ("b.c", "[x, '#']", "in it"),
        ("b.d", "${a}", "above and behind"),
        ("e", "{}", ""),
    ]


def test_every_setting_of_a_run_has_an_entry_in_both_languages():
    leaves = [key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())]
    for language in ("en", "zh"):
        shown = re.findall(r"^### `([^`]+)`$", settings.page(language), re.MULTILINE)
        assert set(leaves) <= set(shown) and len(set(shown)) == len(shown) > 200


@pytest.mark.parametrize("stage", settings.STAGES)
def test_what_the_page_says_of_a_stage_is_what_hydra_composes(stage):
    for key, setting in settings.settings().items():
        if setting.default in (None, "???"):
            continue
        shown = settings.of_stages().get(key, {}).get(stage, setting.default)
        composed = reduce(getitem, key.split("."), composed_preset(stage))
        assert yaml.safe_load(shown) == composed, key


def test_a_changed_comment_asks_for_its_translation_to_be_looked_at(monkeypatch):
    there = settings.translations()
    changed = {**there, "data.seed": {**there["data.seed"], "en": "as it was"}}
    changed.pop("data.shuffle")
    changed["data.gone"] = {"en": "x", "zh": "x"}
    monkeypatch.setattr(settings, "translations", lambda: changed)
    found = settings.problems()
    assert [problem.split(":")[0] for problem in sorted(found)] == ["data.gone", "data.seed", "data.shuffle"]
    assert "as it was" in found[1] or "as it was" in found[0]


def test_translations_are_chinese_and_keep_the_names_of_settings_and_values():
    for key, text in settings.translations().items():
        assert re.search("[\u4e00-\u9fff]", text["zh"]) or text["en"].startswith("`"), key
        # Formulas and paths in backticks are the same text.
        for code in re.findall(r"`([^`]+)`", text["en"]):
            assert code.lstrip("+ ") in text["zh"], key


# ---- models in Chinese


def test_the_chinese_page_of_models_has_the_english_ones_families_and_versions():
    english = models.ENGLISH.read_text(encoding="utf-8")
    families = [line.split(" | ")[0] for line in english.splitlines() if line.startswith("| ")]
    chinese = [line.split(" | ") for line in models.page().splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in chinese[1:]] == families[1:] and len(families) > 100
    assert all(re.search("[\u4e00-\u9fff]", cells[1]) for cells in chinese)
    assert re.search(r"transformers [\d.]+", english)[0] in models.page()


def test_an_english_page_of_models_that_says_something_new_asks_for_chinese(tmp_path, monkeypatch):
    text = models.ENGLISH.read_text(encoding="utf-8")
    changed = text.replace("Which families", "Which of them", 1) + "| new | packed | unsure | it does not say why |\n"
    (tmp_path / "models.md").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(models, "ENGLISH", tmp_path / "models.md")
    found = models.problems()
    assert [problem.rpartition(": ")[2] for problem in found[1:]] == ["unsure", "it does not say why"]
    assert "above its table has changed" in found[0]


# ---- metrics


# What reads metrics, or has nothing to do with them.
APART = ("monitor", "compat", "cli", "pipeline", "tools", "data_tools", "model_merger", "scripts", "config", "launch")
ONLY_READ = ("utils/step_line.py", "trainer/ppo/display.py", "trainer/ppo/ending.py", "trainer/ppo/next_commands.py",
             "utils/tracking", "trainer/config")  # fmt: skip
NAME = re.compile(r"(actor|critic|val|train|training|perf|timing_s|timing_per_token_ms|response_length|prompt_length|"
                  r"global_seqlen)/[\w/-]*\w")  # fmt: skip


@cache
def written() -> tuple[set[str], list[re.Pattern]]:
    """The texts, and the patterns of f-strings, in the modules that make metrics."""
    texts, patterns = set(), set()
    for file in (ROOT / "verl").rglob("*.py"):
        path = str(file.relative_to(ROOT / "verl"))
        if path.split("/")[0] in APART or path.startswith(ONLY_READ):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    re.escape(part.value) if isinstance(part, ast.Constant) else r"([\w/-]+)" for part in node.values
                ]
                patterns.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | within:
                texts.add(node.value)
    # Of names with a part to fill in: `critic/{who}_score`, `{name}/mean`.
    named = [
        pattern
        for pattern in patterns
        if re.fullmatch(r"[\w/]*", pattern.replace(r"([\w/-]+)", "")) and "/" in pattern.replace(r"[\w/-]", "")
    ]
    return texts, [re.compile(pattern) for pattern in named]


@cache
def is_written(name: str, depth: int = 4) -> bool:
    """Whether a name is a text of a module that makes metrics, or an f-string's of such."""
    texts, patterns = written()
    if name in texts or name.isdigit():
        return True
    if depth == 0:
        return False
    for pattern in patterns:
        found = pattern.fullmatch(name)
        if found and all(
            group != name and (is_written(group, depth - 1) or is_written(f"critic/{group}", depth - 1))
            for group in found.groups()
        ):
            return True
    return False


def test_every_name_in_the_catalogue_is_written_somewhere():
    assert [name for name in sorted(metrics.names()) if not is_written(name)] == []
    assert not is_written("critic/no_such") and not is_written("timing_s/no_such")


def test_every_name_that_the_code_writes_is_in_the_catalogue():
    known = metrics.names()
    found = {text for text in written()[0] if NAME.fullmatch(text)}
    bases = {name.rpartition("/")[0] for name in known}
    assert len(found) > 70 and sorted(found - known - bases) == []


def test_names_that_rules_and_the_report_read_are_in_the_catalogue():
    read = set(metrics._rules()) | {
        name
        for section in yaml.safe_load((ROOT / "verl/monitor/report/panels.yaml").read_text())
        for panel in section["panels"]
        for name in panel["metrics"]
    }
    assert sorted(read - metrics.names() - {"teacher's length"}) == []


def test_what_each_stage_must_log_is_in_the_catalogue_of_that_stage():
    common = metric_names.COMMON_METRICS - {"timing_s/gen"} | metric_names.VALIDATION_METRICS
    assert metric_names.SEQKD_METRICS | common <= metrics.names("seqkd")
    for stage in ("warmup", "gad"):
        assert metric_names.DISCRIMINATOR_METRICS | metric_names.POLICY_METRICS | common <= metrics.names(stage)
    assert common <= metrics.names("soda")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests/monitor/healthy").glob("*.jsonl.gz")), ids=lambda file: file.stem
)
def test_runs_that_were_kept_logged_nothing_else(file):
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    logged = {name for line in lines for name in json.loads(line)["data"]}
    stage = next((name for name in ("seqkd", "warmup") if name in file.name.split(".")[0].split("_")), "gad")
    assert len(logged) > 4 and sorted(logged - metrics.names(stage)) == []
