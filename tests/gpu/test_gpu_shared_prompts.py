"""Prompts computed once for several answers, on the GPU's flash-attention kernels: against fp32 rows of their own."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.shapes import VOCAB, language_model
from tests.tiny import answer_rows
from verl.models import attention
from verl.models.answer_models import PolicyModel
from verl.models.layers import compile_layers
from verl.models.packing import AnswerRows, pack

# Prompt lengths, and how long the answers to each are.
MIXED = ([300, 1, 640, 7], [[200, 1, 77, 256], [64], [3, 500, 128, 128, 9, 31, 250, 2], [90, 40]])
# An answer without a token: of one that is only EOS, where EOS is not scored, nothing is left.
FEW_TOKENS = ([40, 25, 3], [[1, 0], [0, 1], [0, 0]])


def rows_of(prompts: list[int], answers: list[list[int]]) -> AnswerRows:
    """As many rows as answers, those to one prompt next to each other."""
    first = [sum(map(len, answers[:index])) for index, group in enumerate(answers) for _ in group]
    lengths = [prompt for prompt, group in zip(prompts, answers, strict=True) for _ in group]
    rows = answer_rows(lengths, [length for group in answers for length in group])
    return AnswerRows(rows.prompts[first] % VOCAB, rows.prompt_mask[first], rows.responses % VOCAB, rows.response_mask)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("lengths", [MIXED, FEW_TOKENS], ids=["mixed", "a token or none"])
@pytest.mark.parametrize("heads", [(12, 2, 128), (32, 8, 64)], ids=["qwen2", "llama"])
def test_attention_and_its_gradients(lengths, heads, cuda, monkeypatch):
    layout = pack(rows_of(*lengths)).to(cuda).layout
    assert layout.answer_tokens == sum(sum(group) for group in lengths[1] if len(group) > 1)
    queries, groups, size = heads
    generator = torch.Generator(cuda).manual_seed(0)
    states = [
        torch.randn(1, count, len(layout.place), size, generator=generator, device=cuda, dtype=torch.bfloat16)
        for count in (queries, groups, groups)
    ]
    weights = torch.randn(1, len(layout.place), queries, size, generator=generator, device=cuda)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [state.to(dtype).requires_grad_() for state in states]
        output, _ = attention.packed_attention(None, *inputs, None, scaling=size**-0.5, **layout.arguments())
        (output * weights).sum().backward()
        return [output.detach(), *(state.grad for state in inputs)]

    exact = run(torch.float32)
    monkeypatch.setattr(attention, "_on_grid", lambda *_: pytest.fail("the flash-attention kernel did not run"))
    for name, ours, expected in zip(("output", "query", "key", "value"), run(torch.bfloat16), exact, strict=True):
        # bf16 keeps eight bits: 2^-8 is 0.004.
        assert distance(ours, expected) < 0.01, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_rounds_as_rows_of_their_own_do(compiled, cuda):
    rows = rows_of(*MIXED)
    weights = torch.linspace(-1, 1, rows.responses.numel()).view(rows.responses.shape)

    def run(dtype: torch.dtype, shared: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        module = PolicyModel(language_model("qwen2", dtype)).to(cuda)
        if shared and compiled:
            torch._dynamo.reset()
            compile_layers(module.hf)
        parts = [list(range(len(rows)))] if shared else [[row] for row in range(len(rows))]
        log_probs = torch.cat([module(rows.select(part), 0.8)[0] for part in parts])
        (log_probs * weights.to(cuda)).sum().backward()
        return log_probs.detach(), {name: p.grad.float() for name, p in module.named_parameters()}

    exact, apart, together = run(torch.float32, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    assert distance(together[0], exact[0]) < 1.25 * distance(apart[0], exact[0])
    for name, gradient in exact[1].items():
        rounding = distance(apart[1][name], gradient)
        assert distance(together[1][name], gradient) < max(1.25 * rounding, 0.01), (name, rounding)
