"""Values that are allowed and hardly meant: refused where nothing else can be meant, told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from verl.config.run import Config
from verl.utils.command_line import called_as

NO_TEXT = ("None", "none", "Null", "nil", "~")
# Above: answers are noise; and AdamW moves every weight by about its rate, where weights are a few hundredths.
HOT, FAST = 2.0, 1e-2


def nothing_conflicts(config: Config) -> Iterator[str]:
    """Python's word for nothing, which is a text here, where nothing is allowed."""
    for key, value, may_be_null in _texts(config, ""):
        if may_be_null and value in NO_TEXT:
            yield f"{key}={value} is a text of {len(value)} letters: write {key}=null for none"


def _texts(settings: Any, prefix: str) -> Iterator[tuple[str, str, bool]]:
    """Keys, values that are text, and whether the key may be null."""
    for name, kind in get_type_hints(type(settings)).items():
        value, key = getattr(settings, name), prefix + name
        if dataclasses.is_dataclass(value):
            yield from _texts(value, f"{key}.")
        elif isinstance(value, str):
            yield key, value, type(None) in get_args(kind)


def doubts(config: Config) -> Iterator[str]:
    """Sentences about settings that a run can have and hardly anyone wants."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    if data.max_response_length == 1:
        yield "data.max_response_length=1 leaves one token of every answer: there is nothing to learn to write"
    if rollout.do_sample and rollout.temperature > HOT:
        yield (
            f"actor_rollout_ref.rollout.temperature={rollout.temperature}: above {HOT:g} answers are mostly noise; 0.8 "
            "to 1 is usual"
        )
    parts = [("actor_rollout_ref.actor", config.actor_rollout_ref.actor.optim)]
    if config.use_critic:
        parts.append(("critic", config.critic.optim))
    for name, optim in parts:
        if optim.lr >= FAST:
            yield (
                f"{name}.optim.lr={optim.lr:g} undoes a pretrained model within a few steps: 1e-6 to 1e-5 is usual, "
                "and up to 1e-3 for tiny ones"
            )
    same = _files(data.train_files) & _files(data.val_files)
    if same:
        yield (
            f"data.val_files has {', '.join(sorted(same))}, which is training data: validation shows what was learned "
            f"by heart; `{called_as('verl.data_tools.split')}` makes files without common prompts"
        )


def doubt_of_rows(rows: int, config: Config) -> Iterator[str]:
    """A sentence if a batch is larger than the data."""
    batch = config.data.train_batch_size
    if batch > rows:
        yield (
            f"data.train_batch_size={batch} is more than the {rows} rows there are: a step has each row "
            f"{batch / rows:.3g} times; lower it to {rows} or less"
        )


def _files(names: str | list[str] | None) -> set[str]:
    given = [names] if isinstance(names, str) else names or []
    return {str(Path(name).expanduser().resolve()) for name in given}
