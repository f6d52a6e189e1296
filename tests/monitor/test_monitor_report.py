"""The report: its numbers, and the page as a real browser shows it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from tests.monitor.bad_runs import BAD_RUNS, healthy_rows
from tests.monitor.chromium import Browser, find_chromium
from verl.monitor.__main__ import main
from verl.monitor.report.answers import read_answers, spread
from verl.monitor.report.document import bands, describe, see
from verl.monitor.report.page import document, page
from verl.monitor.report.points import fewer, rounded
from verl.monitor.report.provenance import settings_table
from verl.monitor.rules import load_rules
from verl.monitor.series import Run

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028\x00{{7*7}}"
)
RECORD = {
    "started": "2026-01-02 03:04 UTC", "stage": "GAD", "preset": "gad", "device": "2 x cuda (NVIDIA H200)",
    "changed": {"critic.optim.lr": [1e-6, 5e-6]}, "git": "0123456789abcdef", "dirty": True,
    "versions": {"verl": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture(scope="module")
def rules():
    return load_rules()


def write_run(folder: Path, rows, settings=None, record=None, samples=(), text="an answer") -> Path:
    folder.mkdir(parents=True)
    lines = (json.dumps({"step": step, "data": data}) for step, data in rows)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if settings is not None:
        (folder / "settings.json").write_text(json.dumps(settings))
    if record is not None:
        (folder / "run.json").write_text(json.dumps({"starts": [record]}))
    for step in samples:
        (folder / "val_samples").mkdir(exist_ok=True)
        answers = [
            {
                "step": step, "prompt": f"prompt {number} {text}", "teacher": f"teacher {text}",
                "student": f"at {step}: {text}", "score": 0.5 + number, "teacher_score": 1.25, "tokens": 7,
                "finish_reason": "stop",
            }
            for number in range(3)
        ]  # fmt: skip
        pd.DataFrame(answers).to_parquet(folder / "val_samples" / f"step_{step}.parquet")
    return folder


# ---- numbers


def test_fewer_keeps_ends_and_extremes():
    values = [0.0] * 1000
    values[333], values[777] = 9.0, -9.0
    kept = fewer(values, 50)
    assert len(kept) <= 50 and kept == sorted(kept) and {0, 333, 777, 999} <= set(kept)
    assert fewer([1.0, 2.0], 4) == [0, 1]
    assert fewer([math.nan] * 100, 10) == [0, 99]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1 / 3, 0.33333), (2.0, 2), (1e-9, 1e-9), (math.nan, None), (-math.inf, None), (123456.7, 123460)],
)
def test_rounded(value, shown):
    assert rounded(value) == shown


@pytest.mark.parametrize(
    ("steps", "most", "taken"),
    [([], 4, []), ([5], 4, [5]), ([0, 10, 20, 30, 40], 3, [0, 20, 40]), (list(range(0, 100, 10)), 4, [0, 30, 60, 90])],
)
def test_spread(steps, most, taken):
    assert spread(steps, most) == taken


def test_bands_are_where_no_rule_of_the_stage_fires(rules):
    run = Run.of(
        "x", [(step, {"critic/d_acc": 0.7} | ({"actor/pg_loss": 0.1} if step > 4 else {})) for step in range(9)]
    )
    seen = see(".", run, rules)
    assert seen.stages == [["warmup", 0, 4], ["GAD", 5, 8]]
    # discriminator_blind from below, discriminator_too_strong from above; the note discriminator_slow does not count.
    assert bands(seen.watch, seen.stages)["critic/d_acc"] == [[0, 5, 0.53, 0.97], [5, 8, 0.53, 0.9]]


@pytest.mark.parametrize("name", ["critic/length_reward_corr_in_groups", "critic/length_reward_corr"])
def test_a_band_is_at_the_metric_that_its_rule_reads(rules, name):
    run = Run.of("x", [(step, {"critic/d_acc": 0.7, name: 0.1, "actor/pg_loss": 0.1}) for step in range(9)])
    seen = see(".", run, rules)
    found = bands(seen.watch, seen.stages)
    assert {metric: pieces for metric, pieces in found.items() if "corr" in metric} == {name: [[0, 8, -0.3, 0.3]]}


def test_a_validation_is_no_step():
    run = Run.of("x", [(0, {"val/x": 1.0, "y": 1.0}), (1, {"y": 1.0}), (2, {"val/x": 1.0})])
    assert run.made == 2 and Run.of("x", [(0, {"val/x": 1.0})]).made == 1


def test_what_a_run_shows(rules):
    rows = [
        (
            step,
            {
                "critic/d_acc": 0.6, "response_length/mean": 30.0, "critic/length_ratio": 1.5,
                "critic/student_score_mean": 1.0, "critic/student_score_std": 0.25,
                **{f"critic/teacher_score/p{rank}": float(rank) for rank in ("05", "25", "50", "75", "95")},
                "timing_s/step": 10.0, "timing_s/gen": 6.0, "timing_s/update_actor": 3.0, "timing_s/testing": 2.0,
            },
        )
        for step in range(4)
    ]  # fmt: skip
    found = describe(see(".", Run.of("x", rows), rules), runs=1)
    assert found["series"]["teacher's length"] == [[0, 1, 2, 3], [20, 20, 20, 20]]
    assert found["scores"]["student"] == {
        "kind": "deviation", "steps": [0, 1, 2, 3], "columns": [[0.75] * 4, [1] * 4, [1.25] * 4]
    }  # fmt: skip
    assert found["scores"]["teacher"]["columns"] == [[5] * 4, [25] * 4, [50] * 4, [75] * 4, [95] * 4]
    assert [(row["part"], row["seconds"], row["mean"]) for row in found["time"]] == [
        ("gen", 24, 6), ("update_actor", 12, 3), ("testing", 8, 2), ("other", 4, None),
    ]  # fmt: skip
    assert found["record"] is None and found["answers"] is None


def test_settings_that_differ_from_the_preset_or_between_runs():
    one = {"critic": {"optim": {"lr": 5e-6}}, "data": {"seed": 1, "train_batch_size": 8}}
    two = {"critic": {"optim": {"lr": 5e-6}}, "data": {"seed": 2, "train_batch_size": 8}}
    rows = settings_table([one, two, {}], [{"changed": {"critic.optim.lr": [1e-6, 5e-6]}}, None, None])
    assert {row["key"]: row["cells"] for row in rows} == {
        "data.train_batch_size": [{"value": "8"}, {"value": "8"}, None],
        "critic.optim.lr": [{"value": "5e-06", "preset": "1e-06"}, {"value": "5e-06"}, None],
        "data.seed": [{"value": "1"}, {"value": "2"}, None],
    }


def test_answers_of_some_steps(tmp_path):
    folder = write_run(tmp_path / "run", healthy_rows(3, seed=1), samples=(0, 5, 10, 15, 20, 25))
    (folder / "val_samples" / "step_30.parquet").write_text("cut off")
    # Those of an earlier run in the folder, set aside.
    (folder / "val_samples" / "20260101-000000").mkdir()
    (folder / "val_samples" / "20260101-000000" / "step_40.parquet").write_text("of another run")
    found = read_answers(folder)
    assert found["steps"] == [0, 10, 20]  # 0, 10, 20 and 30, of which the last is broken
    assert [item["prompt"] for item in found["prompts"]] == [f"prompt {number} an answer" for number in range(3)]
    assert found["prompts"][1]["answers"]["10"] == {
        "text": "at 10: an answer", "score": 1.5, "teacher_score": 1.25, "tokens": 7, "finish": "stop"
    }  # fmt: skip


def test_answers_without_scores_and_prompts_as_messages(tmp_path):
    (tmp_path / "val_samples").mkdir()
    prompt = [{"role": "user", "content": "why?"}]
    row = {"step": 3, "prompt": prompt, "teacher": "so", "student": None, "score": None, "teacher_score": None}
    pd.DataFrame([row]).to_parquet(tmp_path / "val_samples" / "step_3.parquet")
    (item,) = read_answers(tmp_path)["prompts"]
    assert (item["prompt"], item["teacher"]) == ("user: why?", "so")
    assert item["answers"]["3"] == {"text": "", "score": None, "teacher_score": None, "tokens": None, "finish": ""}


def test_1000_steps_stay_under_2_mb(rules, tmp_path):
    folder = write_run(tmp_path / "run", healthy_rows(1000, seed=1), {}, RECORD, range(0, 1000, 50), "long text " * 400)
    seen = see(folder, Run.of("run", healthy_rows(1000, seed=1)), rules)
    text = page(document([seen]))
    assert len(text.encode()) < 2_000_000
    assert document([seen])["runs"][0]["thinned"]


def test_a_page_has_no_address_to_load_from(rules):
    text = page(document([see(".", Run.of("x", healthy_rows(30, seed=1)), rules)]))
    for word in ("src=", "<link", "@import", "url(", "fetch(", "XMLHttpRequest"):
        assert word not in text
    assert "default-src 'none'" in text and "unsafe" not in text


def test_the_command(tmp_path, capsys):
    well = write_run(tmp_path / "well", healthy_rows(30, seed=1))
    ill = write_run(tmp_path / "ill", BAD_RUNS["too strong"].rows)
    out = tmp_path / "report.html"
    assert main([str(well), "--html", str(out)]) == 0 and out.is_file()
    assert main([str(well), str(ill), "--html", str(out)]) == 1
    assert "Unhealthy at step 39" in out.read_text() and "== ill" in capsys.readouterr().out
    assert main([str(well), "--html", str(tmp_path / "missing" / "report.html")]) == 2
    assert main([str(well), str(ill), "--plot"]) == 2
    assert main(["--html", str(out)]) == 2


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(rules, tmp_path_factory):
    """One run with everything, two beside each other, and one full of hostile text."""
    folder = tmp_path_factory.mktemp("reports")
    bad = BAD_RUNS["too strong"]
    whole = write_run(folder / "whole", bad.rows, bad.settings, RECORD, (0, 10, 20), "答案 and a " + "long" * 200)
    other = write_run(folder / "other", healthy_rows(60, seed=1))
    changed = {f"data.{HOSTILE}": [HOSTILE, HOSTILE]}
    record = {**RECORD, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "changed": changed}
    evil = write_run(folder / "evil", bad.rows, {"critic": {"optim": {"lr": HOSTILE}}}, record, (0,), HOSTILE)
    for name, runs in {"one": [whole], "two": [whole, other], "evil": [evil]}.items():
        main([*map(str, runs), "--html", str(folder / f"{name}.html")])
    return folder


LOOKS = """({
  wide: document.documentElement.scrollWidth,
  window: innerWidth,
  cut: [...document.querySelectorAll(".card")].filter(card => card.getBoundingClientRect().right > innerWidth).length,
  scrolled: [...document.querySelectorAll(".wide")].filter(card => card.scrollWidth > card.clientWidth).length,
  charts: document.querySelectorAll('.uplot').length,
  wordless: document.body.innerText.includes('undefined'),
  theme: document.documentElement.dataset.theme,
  verdict: document.querySelector('.verdict p').textContent,
})"""


# Texts that lie over each other, by their lines' boxes; what is folded away, or scrolled out of sight, has none.
OVERLAPS = """(() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.getElementById('page'), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.textContent.trim() || !node.parentElement.checkVisibility({contentVisibilityAuto: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const {bottom, right} = node.parentElement.getBoundingClientRect();
    const clips = getComputedStyle(node.parentElement).overflow === 'hidden';
    for (const box of range.getClientRects()) {
      const end = clips ? Math.min(box.right, right) : box.right;
      const shown = {top: box.top, bottom: box.bottom, left: box.left, right: end};
      if (box.width > 1 && box.top < bottom) boxes.push([shown, node.textContent]);
    }
  }
  boxes.sort((one, other) => one[0].top - other[0].top);
  const found = [];
  boxes.forEach(([one, text], place) => {
    for (let next = place + 1; next < boxes.length && boxes[next][0].top < one.bottom - 4; next += 1) {
      const [other, others] = boxes[next];
      if (Math.min(one.right, other.right) - Math.max(one.left, other.left) > 2) found.push([text, others]);
    }
  });
  return found;
})()"""


@pytest.mark.parametrize(("name", "width"), product(("one", "two"), (1280, 360)))
def test_it_shows_without_a_complaint(browser, reports, name, width):
    for language, theme in product(("en", "zh"), ("light", "dark")):
        browser.open(f"{(reports / name).as_uri()}.html#lang={language}&theme={theme}", width)
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("file://")] == []
        assert len(browser.requests()) == 1
        looks = browser.run(LOOKS)
        assert looks["wide"] <= looks["window"] == width and looks["cut"] == looks["scrolled"] == 0
        assert browser.run(OVERLAPS) == []
        assert looks["charts"] > 5 and not looks["wordless"] and looks["theme"] == theme
        assert looks["verdict"].startswith("Unhealthy" if language == "en" else "不健康")
        assert painted(browser)


def painted(browser) -> bool:
    """Whether every chart's canvas has something on it."""
    return browser.run(
        "[...document.querySelectorAll('canvas')].every(canvas => canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data.some(value => value))"
    )


def test_switches(browser, reports):
    browser.open(f"{(reports / 'two').as_uri()}.html#lang=en&theme=light", 1280)
    press = "(text => [...document.querySelectorAll('button')].find(button => button.textContent === text).click())"
    before = browser.run("document.querySelectorAll('#alarms .card').length")
    browser.run(f"{press}('other')")
    assert (before, browser.run("document.querySelectorAll('#alarms .card').length")) == (2, 1)
    browser.run(f"{press}('中文')")
    browser.run(f"{press}('深色 / 浅色')")
    assert browser.run("[document.documentElement.lang, document.documentElement.dataset.theme]") == ["zh-CN", "dark"]
    assert browser.run("document.querySelector('h1').textContent") == "训练报告"
    assert browser.complaints() == []
    assert browser.pdf().startswith(b"%PDF")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.querySelector('.tools')).display") == "none"
    browser.ask("Emulation.setEmulatedMedia", media="")
    assert browser.run("document.documentElement.dataset.theme") == "dark"


ODD = {
    "one step": [(7, {"critic/d_acc": 0.5, "critic/grad_norm": 0.0, "critic/student_score_mean": 0.0})],
    "zeros": [(step, {"critic/grad_norm": 0.0, "actor/grad_norm": 0.0, "critic/d_acc": 0.5}) for step in range(30)],
    "nan": [
        (step, {"critic/d_acc": math.nan, "actor/grad_norm": math.inf, "actor/sft_loss": 1.0}) for step in range(30)
    ],
    "huge": [(step * 10**9, {"critic/d_acc": 1e300, "actor/sft_loss": -1e-300, "x": 1}) for step in range(-5, 25)],
    "on and off": [
        (step, {"critic/d_acc": 0.99 if step % 60 < 30 else 0.7, "actor/pg_loss": 0.1}) for step in range(600)
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs(browser, tmp_path, name):
    folder = write_run(tmp_path / "run", ODD[name], record={"versions": 3})
    main([str(folder), "--html", str(tmp_path / "report.html")])
    browser.open((tmp_path / "report.html").as_uri(), 1280)
    assert browser.complaints() == []
    assert browser.run("document.querySelectorAll('.uplot').length") > 0 and painted(browser)
    assert browser.run("document.querySelectorAll('footer').length") == 1


def test_texts_do_not_run(browser, reports):
    browser.open(f"{(reports / 'evil').as_uri()}.html", 1280)
    assert browser.run("document.title") == "evil"
    assert browser.run("document.querySelectorAll('img, #page script').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 3
    assert "<img src=x onerror=" in browser.run("document.querySelector('.answer.teacher .text').textContent")
    assert browser.complaints() == []


def has_chinese_font() -> bool:
    if shutil.which("fc-list") is None:
        return False
    return bool(subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True).stdout.strip())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_glyph_is_there(browser, reports, language):
    """A character that no font has is drawn like one that no font can have."""
    if language == "zh" and not has_chinese_font():
        pytest.skip("no font with Chinese characters is installed (apt-get install fonts-wqy-zenhei)")
    # The sample answers have Chinese in both languages, and are a user's.
    browser.open(f"{(reports / 'two').as_uri()}.html#lang={language}", 1280)
    browser.run("document.getElementById('answers').remove()")
    missing = browser.run(
        """(() => {
          const canvas = document.createElement('canvas');
          canvas.width = canvas.height = 24;
          const brush = canvas.getContext('2d', {willReadFrequently: true});
          brush.font = '18px ' + getComputedStyle(document.body).fontFamily;
          const drawn = letter => {
            brush.clearRect(0, 0, 24, 24);
            brush.fillText(letter, 1, 19);
            return brush.getImageData(0, 0, 24, 24).data.join();
          };
          const none = drawn(String.fromCodePoint(0x10fffd));
          const letters = new Set(document.body.innerText.replace(/\\s/g, ''));
          if (document.documentElement.lang === 'en') letters.forEach(x => x > '\\u2fff' && letters.delete(x));
          return [...letters].filter(letter => drawn(letter) === none);
        })()"""
    )
    assert missing == []
