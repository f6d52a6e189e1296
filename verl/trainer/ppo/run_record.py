"""What was run, kept in the run's folder from its start: `run.json`, for reports (`python -m verl.monitor --html`).

One entry per start, so that a run that went on elsewhere, or with other settings, shows it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

import verl
from verl.config.run import Config
from verl.monitor.report.provenance import NAMES, RECORD_FILE, flat
from verl.trainer.config.loading import composed_preset, preset_settings
from verl.utils.hub import hub_origin

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "ray", "vllm")
STAGES = ("seqkd", "warmup", "gad", "gad_short", "soda")
TIMEOUT_S = 10
# Of a start's entry: what the time to its first step went to.
SECONDS = "seconds_to_first_step"


def keep_record(config: Config, folder: Path, resumed: bool) -> None:
    """Add this start to the record of a run that has `resumed`, or begin one. A record that fails is said and ends
    nothing."""
    file = folder / RECORD_FILE
    try:
        _write(file, [*(_earlier(file) if resumed else []), describe_start(config)])
    except Exception as error:
        logger.warning("%s is not kept (%s: %s)", RECORD_FILE, type(error).__name__, error)


def keep_start_seconds(folder: Path, seconds: dict[str, Any]) -> None:
    """Add to the last start of a record the seconds from its command to its first step, unless it has some: this start
    was not kept then. One that fails is said."""
    file = folder / RECORD_FILE
    try:
        starts = _earlier(file)
        if starts and SECONDS not in starts[-1]:
            _write(file, [*starts[:-1], {**starts[-1], SECONDS: seconds}])
    except Exception as error:
        logger.warning("%s does not get the start's seconds (%s: %s)", RECORD_FILE, type(error).__name__, error)


def _write(file: Path, starts: list[Any]) -> None:
    part = file.with_suffix(".part")
    try:
        text = json.dumps({"starts": starts}, indent=1, ensure_ascii=False, default=str)
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(part, file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def describe_start(config: Config) -> dict[str, Any]:
    """Stage, preset, and the settings that differ from it as {key: [preset's, own]}; versions, device, revision;
    what comes from the hub, with its commit."""
    preset = preset_of(config)
    revision, dirty = _revision()
    hub = hub_names(config)
    return {
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "stage": config.stage,
        "preset": preset,
        "changed": changed_settings(config),
        "device": f"{config.processes} x {config.trainer.device} ({_device(config.trainer.device)})",
        "git": revision,
        "dirty": dirty,
        **({"hub": hub} if hub else {}),
        "versions": {"verl": verl.__version__, "python": platform.python_version(), **_versions()},
    }


def hub_names(config: Config) -> dict[str, list[str]]:
    """The models and data that come from the hub, by setting, as names that say the commit."""
    policy_settings, critic = config.actor_rollout_ref, config.critic
    given = {
        "data.train_files": config.data.train_files,
        "data.val_files": config.data.val_files,
        "actor_rollout_ref.model.path": policy_settings.model.path,
        "actor_rollout_ref.model.tokenizer_path": policy_settings.model.tokenizer_path,
    }
    if config.use_critic:
        given["critic.model.path"] = critic.model.path
    lists = {key: [value] if isinstance(value, str) else value or [] for key, value in given.items()}
    origins = {key: [hub_origin(path) for path in paths] for key, paths in lists.items()}
    found = {key: [origin.where for origin in some if origin is not None] for key, some in origins.items()}
    return {key: names for key, names in found.items() if names}


def _earlier(file: Path) -> list[Any]:
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def preset_of(config: Config) -> str:
    """The stage that was chosen on the command line; of a run that no command line began, the one that its settings
    differ least from."""
    if HydraConfig.initialized() and "stage" in HydraConfig.get().runtime.choices:
        return HydraConfig.get().runtime.choices["stage"]
    now = flat(asdict(config))

    def differences(stage: str) -> int:
        written = flat(composed_preset(stage)).items()
        return sum("${" not in str(value) and _plain(value) != _plain(now.get(key)) for key, value in written)

    return min(STAGES, key=differences)


def changed_settings(config: Config) -> dict[str, list[Any]]:
    """The settings that differ from the preset's, as {key: [preset's, own]}; names of runs and folders left out."""
    preset, settings = preset_of(config), asdict(config)
    before, now = flat(preset_settings(preset, settings)), flat(settings)
    return {
        key: [before.get(key), value]
        for key, value in now.items()
        if _plain(before.get(key)) != _plain(value) and key not in NAMES
    }


def _plain(value: Any) -> Any:
    """As JSON has it, so that a tuple equals a list, and 1 equals 1.0."""
    return json.loads(json.dumps(value, default=str))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device(kind: str) -> str:
    """The name of this machine's accelerator, or of its processor."""
    if kind != "cpu":
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "unknown"
        return names.splitlines()[0]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> tuple[str | None, bool]:
    """The commit of the package's own repository, and whether files differ from it; None where it lies in none."""
    root = Path(verl.__file__).parents[1]
    if not (root / ".git").exists():
        return None, False
    revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
    return revision, bool(revision and _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
