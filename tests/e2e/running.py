"""Running whole stages with the tiny model of `tests.tiny`: on real Ray, or on one rank in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from verl.trainer.config import Config, compose_config
from verl.trainer.main_ppo import run_ppo


def train(folder: Path, name: str, *overrides: str, run_with: Callable[[Config], None] = run_ppo) -> Path:
    """Run one stage on `folder`'s model and data; returns the run's folder."""
    run = folder / "runs" / name
    run_with(
        compose_config(
            [
                "trainer.device=cpu",
                f"data.train_files={folder}/train.jsonl",
                f"data.val_files={folder}/val.jsonl",
                "data.train_batch_size=4",
                "data.max_prompt_length=28",
                "data.max_response_length=10",
                f"actor_rollout_ref.model.path={folder}/base",
                "actor_rollout_ref.rollout.n=3",
                "actor_rollout_ref.actor.optim.lr=1e-3",
                f"trainer.default_local_dir={run}",
                f"trainer.experiment_name={name}",
                "trainer.logger=[file]",
                # The tiny model knows no EOS: nearly all of its answers are cut.
                "algorithm.cut_answers=keep",
                # All of them, for tests to look at.
                "trainer.max_actor_ckpt_to_keep=null",
                "trainer.max_critic_ckpt_to_keep=null",
                *overrides,
            ]
        )
    )
    return run


def read_metrics(run: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, as the JSONL tracker wrote them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["data"] for line in lines}


def assert_equal_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
