"""The packed forward on a GPU is that of the CPU: fp32 to 1e-5, bf16 to its own rounding; values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.shapes import language_model, mixed_rows
from verl.models import attention
from verl.models.answer_models import PolicyModel
from verl.models.layers import compile_layers, recompute_layers
from verl.models.packing import AnswerRows

FAMILIES = ("qwen2", "qwen3", "llama")


def run(module: PolicyModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, entropies and gradients of a weighted sum of the log-probs."""
    rows = mixed_rows()
    log_probs, entropies = module(rows, temperature=0.8, entropy="value")
    weights = torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)
    (log_probs * weights.to(log_probs.device)).sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in module.named_parameters()}
    return log_probs.detach().cpu(), entropies.detach().cpu(), gradients


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_agrees_with_the_cpu(family, cuda):
    expected = run(PolicyModel(language_model(family)))
    actual = run(PolicyModel(language_model(family)).to(cuda))
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)
    for name, gradient in expected[2].items():
        # Sums over two thousand tokens, in another order.
        assert distance(actual[2][name], gradient) < 1e-5, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_off_by_its_rounding_alone(family, compiled, cuda, monkeypatch):
    """Against fp32 on the CPU: no further from it than bf16 on the CPU is, give or take a quarter."""
    exact = run(PolicyModel(language_model(family)))
    on_cpu = run(PolicyModel(language_model(family, torch.bfloat16)))
    module = PolicyModel(language_model(family, torch.bfloat16)).to(cuda)
    if compiled:
        torch._dynamo.reset()
        compile_layers(module.hf)
    monkeypatch.setattr(attention, "_on_grid", lambda *_: pytest.fail("the flash-attention kernel did not run"))
    on_gpu = run(module)
    for part in (0, 1):
        assert distance(on_gpu[part], exact[part]) < 1.25 * distance(on_cpu[part], exact[part])
        assert distance(on_gpu[part], exact[part]) < 0.02
    for name, gradient in exact[2].items():
        rounding = distance(on_cpu[2][name], gradient)
        assert distance(on_gpu[2][name], gradient) < max(1.25 * rounding, 0.01), (name, rounding)


def test_compiled_layers_run_every_length_on_the_same_graphs(cuda):
    """Lengths, rows and tokens of a micro-batch change at every step; the number of graphs does not."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = PolicyModel(language_model("qwen2", torch.bfloat16)).to(cuda)
    compile_layers(module.hf)
    rows = mixed_rows()
    micro_batches = [[0, 1, 2, 3, 4, 5, 6], [2], [1, 3], [4, 5, 6], [0, 6], [2, 3, 4, 5], [3, 5], [1, 2, 6]]
    graphs = []
    for index in micro_batches:
        module(rows.select(index))[0].sum().backward()
        with torch.no_grad():
            module(rows.select(index))
        graphs.append(counters["stats"]["unique_graphs"])
    # With and without gradients, each perhaps once more for a single row.
    assert graphs[0] >= 1 and graphs[-1] <= 4 + graphs[0]
    assert graphs[-1] == graphs[3], graphs


@pytest.mark.parametrize("share", [0.34, 1.0])
def test_recomputing_changes_no_gradient_and_saves_memory(share, cuda):
    results, peaks = [], []
    for recompute in (False, True):
        module = PolicyModel(language_model("qwen3", torch.bfloat16)).to(cuda).train()
        if recompute:
            recompute_layers(module.hf, share)
        torch.cuda.reset_peak_memory_stats()
        results.append(run(module))
        peaks.append(torch.cuda.max_memory_allocated())
        del module
    torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=0)
    for name, gradient in results[0][2].items():
        assert distance(results[1][2][name], gradient) < 1e-2, name
    assert peaks[1] < peaks[0]


def waits_for_nothing(module: PolicyModel, rows: AnswerRows) -> None:
    """From rows in host memory to gradients on the device, a second time, without one synchronisation."""
    module(rows)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(rows, entropy="value")[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_log_prob_pass_waits_for_nothing(cuda):
    waits_for_nothing(PolicyModel(language_model("qwen2", torch.bfloat16)).to(cuda), mixed_rows())
