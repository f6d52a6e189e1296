"""The model card of a merged model, README.md: what it was made from and how, as its run's files tell it.

Nothing private goes into it: of files and folders the last name alone, of settings those that say how a model was
trained, of a judge's report its numbers; no host, no user, no prompt, no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.models.finding import is_discriminator
from verl.monitor.report.provenance import read_record
from verl.utils.checkpoint.best_link import behind_best
from verl.utils.checkpoint.checkpoint_manager import ORIGIN_FILE, STATE_FILE
from verl.utils.checkpoint.whole import ADAPTER_CONFIG, BASE_QUANTIZATION
from verl.utils.command_line import called_as
from verl.utils.hub import SCHEME

CARD = "README.md"
# A card without it is the user's own.
MARK = "<!-- Written by verl.model_merger, which writes it again; take this line out to keep a text of your own. -->"
# Settings that say how a model was trained, and those among them that name a place.
TRAINING = re.compile(
    r"(algorithm|actor_rollout_ref\.(actor|rollout)|critic|soda|data)\..*"
    r"|trainer\.(total_.*|critic_warmup|warmup_use_sft|best_.*|early_stop_.*|n_gpus_per_node|nnodes)"
)
PLACES = re.compile(r".*(path|_files|_dir|_key)")
# A model of the hub, at a commit.
HUB_MODEL = re.compile(r"[\w.-]+/[\w.-]+@\w+", flags=re.ASCII)
# A value that is shown as it is; of `FILE:FUNCTION` the function is.
WORD = re.compile(r"[\w.+-]{1,60}", flags=re.ASCII)
MAX_STAGES = 16


@dataclass(frozen=True)
class Stage:
    """One run on the way from the base model.

    steps: updates made until the checkpoint.
    rows, files: of its training data; the files' names alone.
    record: its last start, as `run.json` has it.
    """

    name: str
    steps: int
    rows: int
    files: list[str]
    record: Mapping[str, Any]


def write_card(folder: Path, local_dir: Path, name: str | None = None, judge: Path | None = None) -> bool:
    """Write the card of the model merged from `local_dir` into `folder`; whether it was written: a card that somebody
    else wrote stays.

    Args:
        name: the model's, OWNER/NAME on the hub; the folder's without one.
        judge: a `judge.json`; left out, the one in the run's `judge` folder, if there is one.

    Raises:
        FileNotFoundError, ValueError: `judge` is not there, or no report of the judge.
    """
    file = folder / CARD
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return False
    score = is_discriminator(folder if (folder / "config.json").is_file() else local_dir.expanduser())
    entries = _entries(folder / ADAPTER_CONFIG)
    adapter, revision = entries.get("base_model_name_or_path"), entries.get("revision")
    if adapter and revision:
        adapter = f"{adapter}@{revision}"
    text = card_of(local_dir, name or folder.resolve().name, score, judge, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return True


def card_of(local_dir: Path, name: str, score: bool, judge: Path | None = None, adapter: str | None = None) -> str:
    """The card's text, of a discriminator if it is to `score`, of an adapter beside the base that `adapter` names; see
    `write_card`."""
    local_dir = behind_best(local_dir.expanduser().absolute())
    stages, base = trace(local_dir)
    verdict = read_judge(find_judge(local_dir) if judge is None else judge)
    parts = [
        _head(base, score, stages, "peft" if adapter else "transformers"),
        MARK,
        f"# {name.rpartition('/')[2]}",
        _summary(base, stages, score),
    ]
    packed = _entries(local_dir / BASE_QUANTIZATION).get("bnb_4bit_compute_dtype")
    parts += [_usage(name, score, adapter, packed), *([_training(stages)] if stages else [])]
    parts += [] if verdict is None else [_judged(verdict)]
    return "\n\n".join(parts) + "\n"


def trace(local_dir: Path) -> tuple[list[Stage], str | None]:
    """The stages that led to a checkpoint's `actor` or `critic`, the first one first, and the base model's name; as far
    back as checkpoints are there."""
    stages: list[Stage] = []
    checkpoint = local_dir.parent
    while len(stages) < MAX_STAGES:
        origin, state = (_entries(checkpoint / file) for file in (ORIGIN_FILE, STATE_FILE))
        try:
            where = str(origin["actor"]["where"])
            files = [_last_name(part) for part in str(origin["data"]["where"]).split(", ")]
            stage = Stage(str(origin["stage"]), int(state["global_step"]), int(origin["rows"]), files, {})
        except (LookupError, TypeError, ValueError):
            return stages, None
        stages.insert(0, _recorded(stage, checkpoint.parent))
        before = Path(where)
        if not re.fullmatch(r"global_step_\d+", before.parent.name):
            return stages, _last_name(where)
        checkpoint = before.parent
    return stages, None


def _recorded(stage: Stage, run: Path) -> Stage:
    return Stage(stage.name, stage.steps, stage.rows, stage.files, read_record(run) or {})


def _entries(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_name(where: str) -> str:
    """What is named as on the hub whole, of a path the last name."""
    return where if where.startswith(SCHEME) or HUB_MODEL.fullmatch(where) else Path(where).name


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def _head(base: str | None, score: bool, stages: list[Stage], library: str) -> str:
    lines = [f"library_name: {library}", *([] if score else ["pipeline_tag: text-generation"])]
    if base is not None and HUB_MODEL.fullmatch(base):
        lines.append(f"base_model: {base.partition('@')[0]}")
    tags = ["distillation", "verl", *dict.fromkeys(stage.name.lower() for stage in stages)]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(base: str | None, stages: list[Stage], score: bool) -> str:
    what = "A discriminator, which scores answers by how much they are like a teacher's" if score else (
        "A student, distilled from the text of a teacher's answers"
    )  # fmt: skip
    path = " -> ".join([base or "its base model", *(stage.name for stage in stages)])
    return f"{what}: {path}." if stages else f"{what}."


def _usage(name: str, score: bool, adapter: str | None, packed: str | None) -> str:
    """`packed`: the type that the base of adapters was computed with, where it was in 4 bits."""
    auto = "AutoModelForTokenClassification" if score else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        more = ", num_labels=1" if score else ""
        if packed:
            lines[1] = lines[1].replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig")
            head = ', llm_int8_skip_modules=["score"]' if score else ""
            lines.append(
                f'four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
                f'bnb_4bit_compute_dtype="{packed}"{head})'
            )
            more += ", quantization_config=four_bits"
        lines.append(f'base = {auto}.from_pretrained("{_last_name(adapter).partition("@")[0]}"{more})')
        lines.append(f'model = PeftModel.from_pretrained(base, "{name}")')
    else:
        lines.append(f'model = {auto}.from_pretrained("{name}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _training(stages: list[Stage]) -> str:
    lines = ["## Training", "", "| stage | steps | rows | data | began |", "|---|---|---|---|---|"]
    for stage in stages:
        began = str(stage.record.get("started", ""))[:10]
        lines.append(f"| {stage.name} | {stage.steps} | {stage.rows:,} | {_cell(', '.join(stage.files))} | {began} |")
    for stage in stages:
        changed = shown_settings(stage.record.get("changed", {}))
        if changed:
            preset = stage.record.get("preset", stage.name)
            lines += ["", f"Settings of {stage.name} that differ from the preset `{preset}`:", ""]
            lines += [f"- `{key}={value}`" for key, value in changed.items()]
    versions = stages[-1].record.get("versions")
    if versions:
        lines += [
            "",
            "Made with " + ", ".join(f"{package} {_word(value)}" for package, value in versions.items()) + ".",
        ]
    return "\n".join(lines)


def shown_settings(changed: Mapping[str, Any]) -> dict[str, str]:
    """The settings that say how a model was trained, with values that name nothing private."""
    shown = {}
    for key, (_, value) in sorted(changed.items()):
        if not TRAINING.fullmatch(key) or PLACES.fullmatch(key):
            continue
        text = value.rpartition(":")[2] if isinstance(value, str) else json.dumps(value)
        if isinstance(value, bool | int | float | None) or WORD.fullmatch(text):
            shown[key] = text
    return shown


def _word(value: object) -> str:
    return str(value) if WORD.fullmatch(str(value)) else "-"


def _cell(text: str) -> str:
    """Text for a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# ---------------------------------------------------------------------------------------------------------------------
# The judge's numbers


def find_judge(local_dir: Path) -> Path | None:
    """The report that the trainer's last lines offer to write, if it is there."""
    file = local_dir.parent.parent / "judge" / "judge.json"
    return file if file.is_file() else None


def read_judge(file: Path | None) -> dict[str, Any] | None:
    """A judge's report; None where there is none.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or is none.
    """
    if file is None:
        return None
    expected = f"--judge {file}: expected a report of {called_as('verl.tools.judge')}"
    if not file.is_file():
        raise FileNotFoundError(f"{expected}, got no such file")
    report = _entries(file)
    if not isinstance(report, dict) or not isinstance(report.get("students"), dict):
        raise ValueError(f"{expected}, got something else")
    return report


def _judged(report: Mapping[str, Any]) -> str:
    head = ["answers", "ROUGE-L", "mean tokens", "cut", "told from the teacher by fresh discriminators", "win rate"]
    lines = ["## Measured by the judge", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in [*report["students"].items(), ("teacher", report.get("teacher", {}))]:
        numbers = found.get("numbers", {})
        cells = [_cell(name), _number(numbers.get("rouge_l")), _number(numbers.get("mean_tokens"), ".1f")]
        cells += [_number(numbers.get("cut"), ".1%"), _estimate(found.get("two_sample", {}).get("accuracy"))]
        cells += [_estimate(found.get("pairwise", {}).get("win_rate"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Told from the teacher: 0.5 is not at all; in brackets the 95% interval."])


def _number(value: Any, form: str = ".3f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _estimate(entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), int | float):
        return "-"
    return f"{entry['value']:.3f} [{_number(entry.get('low'))}, {_number(entry.get('high'))}]"
