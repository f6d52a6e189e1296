"""One update on a GPU has the gradients and the metrics of the same update on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.workers.updates_setup import LOSSES, batch, settings, update


@pytest.mark.parametrize("split", ["whole", "tokens", "padded"])
@pytest.mark.parametrize("loss", LOSSES)
def test_fp32_update_is_that_of_the_cpu(loss, split, cuda):
    expected_module, expected = update(loss, settings(loss), batch())
    module, metrics = update(loss, settings(loss, split), batch(), wrap=lambda m: m.to(cuda))
    for (name, ours), theirs in zip(module.named_parameters(), expected_module.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.cpu(), theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
