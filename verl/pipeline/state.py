"""What has been done, told from the runs' folders and a small `pipeline.json` beside them.

The file says what each stage was begun with, and the step at which its process ended well. All else is looked up: the
newest and the best checkpoint, what they began with, what a merged folder was made of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl.config.run import Config
from verl.monitor.report.provenance import flat
from verl.trainer.ppo.next_commands import best_is_meant
from verl.utils.checkpoint.best_link import best_step
from verl.utils.checkpoint.checkpoint_manager import tracked_step
from verl.utils.checkpoint.checksums import sync_to_disk

FILE = "pipeline.json"
# Settings that a stage which is finished does not depend on any more: names and places (contents are compared through
# origin.json), how it was computed, and when and where it saved, validated and logged.
FREE = re.compile(
    r"trainer\.(logger|log_val_generations|save_val_samples|stall_\w+|nnodes|n_gpus_per_node|device|balance_batch"
    r"|default_\w+|project_name|experiment_name|save_\w+|async_save|max_\w+|on_alarm|monitor_rules|validation_data_dir"
    r"|rollout_data_dir|resume_\w+|test_freq|val_before_train|sft_monitor_freq)"
    r"|ray_kwargs\..*|reward_model\..*"
    r"|data\.(train_files|val_\w+|cache_dir|dataloader_num_workers|filter_overlong_prompts_workers|return_raw_chat)"
    r"|(actor_rollout_ref|critic)\.model\.(path|tokenizer_path|use_shm)"
    r"|.*\.(fsdp_config\..*|\w*micro_batch_size\w*|\w*max_token_len\w*|\w*dynamic_bsz"
    r"|enable_gradient_checkpointing|recompute_share|ulysses_sequence_parallel_size)"
    r"|actor_rollout_ref\.rollout\.(name|gpu_memory_utilization|max_num_seqs|max_model_len|free_cache_engine"
    r"|enforce_eager|tensor_model_parallel_size|max_num_batched_tokens)"
)


class State:
    """The pipeline's file in its folder.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, out: Path):
        self.out = out
        self._stages: dict[str, dict[str, Any]] = {}
        file = out / FILE
        if not file.is_file():
            return
        try:
            stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
            self._stages = {
                stage: {"settings": dict(kept["settings"]), "step": kept["step"], "given": kept.get("given")}
                for stage, kept in stages.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error!r}): remove it, and stages whose last step is there are not repeated"
            ) from error

    def begin(self, stage: str, config: Config, given: Sequence[str] = ()) -> None:
        """Keep what a stage is run with, and which settings (KEY=VALUE) the user gave for it."""
        self._stages[stage] = {"settings": settings_of(config), "step": None, "given": _keys(given)}
        self._write()

    def finish(self, stage: str, step: int) -> None:
        """Keep that a stage has made its last step."""
        self._stages[stage]["step"] = step
        self._write()

    def finished(self, stage: str) -> int | None:
        """The last step of a stage that is done; None of one that is not, or whose checkpoint is gone or has moved
        on since."""
        step = self._stages.get(stage, {}).get("step")
        run = self.out / stage
        there = step is not None and tracked_step(run) == step and (run / f"global_step_{step}").is_dir()
        return step if there else None

    def changes(self, stage: str, config: Config, given: Sequence[str] = ()) -> list[str]:
        """The settings that a stage was last run with and that are others now, in words: those that the user gave then
        or gives now, of which others follow; all, where it is none of these.

        Args:
            given: as `begin` has it, now.
        """
        kept = self._stages.get(stage, {})
        before, now = kept.get("settings", {}), settings_of(config)
        changed = [key for key in before if key in now and before[key] != now[key]]
        if kept.get("given") is not None:
            own = {*kept["given"], *_keys(given)}
            changed = [key for key in changed if key in own] or changed
        return [f"{key}={_shown(before[key])}, now {_shown(now[key])}" for key in changed]

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / FILE, {"stages": self._stages})


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, also after a loss of power."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_to_disk(part)
    os.replace(part, file)
    sync_to_disk(file.parent)


def read_json(file: Path) -> dict[str, Any] | None:
    """What `write_json` has written; None of a file that is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def settings_of(config: Config) -> dict[str, Any]:
    """By key, without those that are `FREE`, as JSON has them."""
    settings = json.loads(json.dumps(flat(asdict(config)), default=str))
    return {key: value for key, value in settings.items() if not FREE.fullmatch(key)}


def _keys(given: Sequence[str]) -> list[str]:
    return [text.partition("=")[0].lstrip("+") for text in given]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def handed_on(run: Path, config: Config) -> Path:
    """The checkpoint of a finished stage that the next one begins with: the best, where `trainer.best_metric` asked
    for one that counts for it and there is one, else the last."""
    step = best_step(run) if config.trainer.best_metric is not None and best_is_meant(config) else None
    if step is None or not (run / f"global_step_{step}").is_dir():
        step = tracked_step(run)
    return run / f"global_step_{step}"
