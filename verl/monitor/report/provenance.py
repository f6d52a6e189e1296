"""What was run: settings, versions, device, as a run leaves them in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.monitor.report.points import rounded

RECORD_FILE = "run.json"
TEXTS = ("started", "stage", "preset", "device", "git")
# Settings that are always shown, beside those that differ from the preset or between the runs.
MAIN = (
    "actor_rollout_ref.model.path",
    "critic.model.path",
    "data.train_files",
    "data.val_files",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.optim.lr",
    "critic.optim.lr",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
    "critic.discriminator.loss",
    "critic.discriminator.pooling",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "trainer.critic_warmup",
    "trainer.total_epochs",
)
# What of a run's settings says nothing about how it trained.
NAMES = (
    "trainer.experiment_name",
    "trainer.project_name",
    "trainer.default_local_dir",
    "trainer.default_tensorboard_dir",
    "trainer.logger",
)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The run's last start as its trainer has recorded it, and `starts`, how many there were; None where there is no
    record, or none that can be read."""
    try:
        starts = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["starts"]
        last = dict(starts[-1])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    texts = {name: value for name in TEXTS if isinstance(value := last.get(name), str)}
    versions, changed = (found if isinstance(found := last.get(name), dict) else {} for name in ("versions", "changed"))
    pairs = {key: pair for key, pair in changed.items() if isinstance(pair, list) and len(pair) == 2}
    return {
        **texts,
        "dirty": last.get("dirty") is True,
        "versions": {name: str(value) for name, value in versions.items()},
        "changed": pairs,
        "starts": len(starts),
    }


def settings_table(settings: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any] | None]) -> list[Any]:
    """Rows of settings, a cell per run: {"key", "main", "cells": [{"value", "preset"} or None]}. A cell has `preset`
    where the value differs from that of the run's preset; None: the run's settings are not known."""
    flats = [flat(tree) for tree in settings]
    changed = [dict((record or {}).get("changed") or {}) for record in records]
    known = [tree for tree in flats if tree]
    every = dict.fromkeys(key for tree in known for key in tree)
    differing = [key for key in every if len({shown(tree.get(key)) for tree in known}) > 1 and key not in NAMES]
    keys = dict.fromkeys(
        [*(key for key in MAIN if key in every), *(key for found in changed for key in found), *differing]
    )
    rows = []
    for key in keys:
        cells = []
        for tree, found in zip(flats, changed, strict=True):
            if not tree and key not in found:
                cells.append(None)
                continue
            preset, value = found.get(key, (None, tree.get(key)))
            cells.append({"value": shown(value), **({"preset": shown(preset)} if key in found else {})})
        rows.append({"key": key, "cells": cells, "differs": key in differing})
    return rows


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def shown(value: Any) -> str:
    """A setting as text, the same for equal values."""
    if isinstance(value, float) and rounded(value) is not None:
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
