"""Windows, sinks, capped scores and linear attention on a GPU: the flash-attention kernels against fp32 on the
right-padded grid, and tiny models against the CPU; values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_gpu_packed_forward import waits_for_nothing
from tests.gpu.test_gpu_shared_prompts import FEW_TOKENS, MIXED, distance, rows_of
from tests.recent_families import FAMILIES, recent
from tests.tiny import answer_rows
from verl.models import attention
from verl.models.answer_models import PolicyModel
from verl.models.layers import compile_layers
from verl.models.packing import AnswerRows, pack

# Query heads, key heads and their size, as in Gemma 3 4B, gpt-oss and OLMo 3 7B.
HEADS = {"gemma3": (8, 4, 256), "gpt_oss": (64, 8, 64), "olmo3": (32, 32, 128)}
# Without experts, whose router sends a token elsewhere for a rounding.
DENSE = ("gemma2", "gemma3", "olmo3", "phi3", "qwen3_5")


def mixed_rows() -> AnswerRows:
    """Three answers to one prompt, one to each of two, two to the last: rows beyond the tiny models' window of 8."""
    first = [0, 0, 0, 3, 4, 5, 5]
    rows = answer_rows([40, 40, 40, 5, 1, 9, 9], [9, 1, 60, 13, 3, 2, 77])
    return AnswerRows(rows.prompts[first], rows.prompt_mask[first], rows.responses, rows.response_mask)


# A window longer than the longest row, 1,140 tokens, is out of reach, one of 1 is the token itself.
@pytest.mark.parametrize("window", [1, 2, 64, 333, 1024, 2048])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_within_a_window_and_its_gradients(heads, sinks, window, cuda, monkeypatch):
    compare_attention(rows_of(*MIXED), heads, sinks, window, cuda, monkeypatch)


@pytest.mark.parametrize("shared", [True, False], ids=["a token or none", "none shared"])
def test_attention_within_a_window_of_short_and_unshared_rows(shared, cuda, monkeypatch):
    rows = rows_of(*FEW_TOKENS) if shared else rows_of([300, 7, 64], [[200], [90], [1]])
    compare_attention(rows, "gpt_oss", True, 16, cuda, monkeypatch)


def compare_attention(rows, heads, sinks, window, cuda, monkeypatch):
    layout = pack(rows, window).to(cuda).layout
    queries, groups, size = HEADS[heads]
    generator = torch.Generator(cuda).manual_seed(0)
    shapes = [(1, count, len(layout.place), size) for count in (queries, groups, groups)] + [(queries,)]
    states = [torch.randn(*shape, generator=generator, device=cuda, dtype=torch.bfloat16) for shape in shapes]
    weights = torch.randn(1, len(layout.place), queries, size, generator=generator, device=cuda)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [state.to(dtype).requires_grad_() for state in states[: 3 + sinks]]
        more = {"sliding_window": window, "s_aux": inputs[3] if sinks else None}
        arguments = {**more, **layout.arguments(), "scaling": size**-0.5}
        output, _ = attention.packed_attention(None, *inputs[:3], None, **arguments)
        (output * weights).sum().backward()
        return [output.detach(), *(state.grad for state in inputs)]

    exact = run(torch.float32)
    monkeypatch.setattr(attention, "_on_grid", lambda *_: pytest.fail("the flash-attention kernel did not run"))
    for name, ours, expected in zip(
        ("output", "query", "key", "value", "sinks")[: 4 + sinks], run(torch.bfloat16), exact, strict=True
    ):
        if window == 1 and not sinks and name in ("query", "key"):
            # One key has the probability 1 whatever its score.
            assert ours.float().abs().max() < 0.05, name
            continue
        # bf16 keeps eight bits: 2^-8 is 0.004. A sink's gradient is a sum over all tokens, of both signs.
        assert distance(ours, expected) < (0.05 if name == "sinks" else 0.01), name


def run(module: PolicyModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and gradients of a weighted sum of them."""
    log_probs, _ = module(mixed_rows(), temperature=0.8)
    weights = torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)
    (log_probs * weights.to(log_probs.device)).sum().backward()
    return log_probs.detach().cpu(), {name: p.grad.float().cpu() for name, p in module.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_agrees_with_the_cpu(family, cuda):
    expected, actual = run(PolicyModel(recent(family))), run(PolicyModel(recent(family)).to(cuda))
    torch.testing.assert_close(actual[0], expected[0], atol=2e-5, rtol=1e-5)
    for name, gradient in expected[1].items():
        if gradient.norm() > 1e-6:
            assert distance(actual[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", DENSE)
def test_bf16_is_off_by_its_rounding_alone(family, compiled, cuda):
    """Against fp32 on the CPU: no further from it than bf16 on the CPU is, give or take a half. Gradients of a few
    numbers each, as of a state's decay, are off by a quarter more or less from one order of sums to another."""
    exact = run(PolicyModel(recent(family)))
    on_cpu = run(PolicyModel(recent(family).bfloat16()))
    module = PolicyModel(recent(family).bfloat16()).to(cuda)
    if compiled:
        torch._dynamo.reset()
        compile_layers(module.hf)
    on_gpu = run(module)
    assert distance(on_gpu[0], exact[0]) < max(1.5 * distance(on_cpu[0], exact[0]), 0.01)
    for name, gradient in exact[1].items():
        if gradient.norm() > 1e-6:
            rounding = distance(on_cpu[1][name], gradient)
            assert distance(on_gpu[1][name], gradient) < max(1.5 * rounding, 0.02), (name, rounding)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_log_prob_pass_waits_for_nothing(family, cuda):
    waits_for_nothing(PolicyModel(recent(family).bfloat16()).to(cuda), mixed_rows())
