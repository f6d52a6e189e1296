"""Updates over NCCL on as many GPUs as there are: the gradients and metrics of one process on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.workers import updates_on_two_ranks
from tests.workers.updates_setup import LOSSES, batch, settings, update


@pytest.mark.several_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_fp32_updates_over_nccl_are_those_of_one_process(ranks, tmp_path):
    """Every rank has other rows, other numbers of tokens and so other micro-batches to fill; none waits for ever."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    torch.multiprocessing.spawn(updates_on_two_ranks.run, args=(ranks, tmp_path, "cuda"), nprocs=ranks)
    for loss in LOSSES:
        module, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                result["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (loss, name)
        assert result["reductions"] == 3, loss
