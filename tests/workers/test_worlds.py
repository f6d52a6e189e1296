"""A checkpoint of any number of ranks is resumed by any other, and merged to the same bits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workers import worlds_ranks
from tests.workers.worlds_ranks import UNEVEN, WORLDS
from verl.model_merger import merge
from verl.utils.checkpoint.checkpoint_manager import seal_checkpoint

# Sums over ranks and micro-batches are added in another order: metrics to this share of theirs (seen: 4e-7), weights to
# this difference (seen: 6e-8; one step changes them by up to 1e-3).
METRICS, WEIGHTS = 1e-5, 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    subprocess.run([sys.executable, "-m", worlds_ranks.__name__, folder], check=True)
    return folder


def kept(file: Path) -> tuple:
    return torch.load(file, weights_only=True)


@pytest.mark.distributed
@pytest.mark.parametrize("saved_by, resumed_on", itertools.product(WORLDS, WORLDS))
def test_the_next_update_is_that_of_the_undisturbed_run(folder, saved_by, resumed_on):
    saved, metrics, after = kept(folder / f"undisturbed_{saved_by}.pt")
    loaded, resumed_metrics, resumed_after = kept(folder / f"of_{saved_by}_on_{resumed_on}.pt")
    shapes = {tuple(tensor.shape) for tensor in saved.values()}
    assert {(261, 36), (6, 36), (6,), (1, 36), (1,)} <= shapes and UNEVEN["vocab_size"] % 8
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved), "what is loaded is equal to the bit"
    assert any(saved[name].any() for name in saved if name.endswith("exp_avg_sq"))
    assert resumed_metrics.keys() == metrics.keys() >= {"actor/grad_norm", "critic/grad_norm", "critic/d_loss"}
    if saved_by == resumed_on:
        assert resumed_metrics == metrics and all(torch.equal(resumed_after[name], after[name]) for name in after)
    for name, value in metrics.items():
        assert resumed_metrics[name] == pytest.approx(value, rel=METRICS, abs=1e-7), name
    assert all((after[name] - saved[name]).any() for name in ("actor.lm_head.weight", "critic.score.weight"))
    for name, tensor in after.items():
        torch.testing.assert_close(resumed_after[name], tensor, atol=WEIGHTS, rtol=METRICS, msg=lambda m, n=name: n + m)


@pytest.mark.distributed
@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_merger_gives_the_same_bits_whatever_world_wrote(folder, tmp_path, part):
    """One state, loaded and saved again by every world."""
    files = []
    for world in WORLDS:
        checkpoint = folder / f"of_1_by_{world}"
        seal_checkpoint(checkpoint, ("actor", "critic"))
        merged = merge(checkpoint / part, tmp_path / str(world))
        files.append({file.name: file.read_bytes() for file in merged.iterdir()})
    assert "model.safetensors" in files[0]
    assert all(other == files[0] for other in files[1:])
    whole = load_file(tmp_path / "8" / "model.safetensors")
    half = load_file(merge(folder / "of_1_by_8" / part, tmp_path / "half", dtype=torch.bfloat16) / "model.safetensors")
    assert half.keys() == whole.keys() and all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
