"""Updates of models with windows, caps, sinks and linear attention: the same gradients however the batch is cut.

Rows of up to 17 tokens exceed the window of 8."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.recent_families import recent, recent_scorer
from tests.workers import recent_on_two_ranks, updates_setup
from tests.workers.updates_setup import batch, settings, update

# Of the actor, and of the discriminator.
LOSSES = ["gspo", "ranking"]


@pytest.fixture(params=["gemma2", "gpt_oss", "qwen3_next"])
def family(request, monkeypatch) -> str:
    monkeypatch.setattr(updates_setup, "causal_lm", partial(recent, request.param))
    monkeypatch.setattr(updates_setup, "scorer", partial(recent_scorer, request.param))
    return request.param


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same(actual, expected):
    assert actual[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        tolerance = 1e-4 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(actual[0][name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: n + m)
    for name, value in expected[1].items():
        assert actual[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_and_metrics_do_not_depend_on_the_split(family, loss):
    whole, expected = update(loss, settings(loss), batch())
    for split in ("tokens", "rows", "padded"):
        cut, metrics = update(loss, settings(loss, split), batch())
        assert_same((gradients(cut), metrics), (gradients(whole), expected))


@pytest.mark.distributed
def test_gradient_and_metrics_do_not_depend_on_the_number_of_ranks(family, tmp_path):
    torch.multiprocessing.spawn(recent_on_two_ranks.run, args=(2, family, LOSSES, tmp_path), nprocs=2)
    for loss in LOSSES:
        whole, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        assert_same((result["gradients"], result["metrics"]), (gradients(whole), expected))
