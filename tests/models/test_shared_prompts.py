"""Prompts that several answers share are computed once, and nothing else changes: against rows of their own."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny import answer_rows, causal_lm, scorer
from verl.models import attention, flash
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.layers import compile_layers
from verl.models.packing import AnswerRows, pack


def families() -> AnswerRows:
    """Three answers to one prompt, one to the next, two to the third; an answer may be a single token."""
    prompt = [0, 0, 0, 1, 2, 2]
    rows = answer_rows([5, 5, 5, 3, 9, 9], [4, 1, 7, 2, 3, 6])
    first = [prompt.index(p) for p in prompt]
    return AnswerRows(rows.prompts[first], rows.prompt_mask[first], rows.responses, rows.response_mask)


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "llama", "scorer"])
def test_values_and_gradients_are_those_of_rows_of_their_own(model):
    rows = families()
    assert pack(rows).input_ids.shape[1] == 5 + 3 + 9 + 23

    def run(shared: bool):
        module = ScoreModel(scorer()) if model == "scorer" else PolicyModel(causal_lm(model))
        parts = [rows] if shared else [rows.select([row]) for row in range(len(rows))]
        outputs = [module(part) if model == "scorer" else module(part, 0.7, "grad") for part in parts]
        outputs = [part if isinstance(part, tuple) else (part,) for part in outputs]
        outputs = [torch.cat(column) for column in zip(*outputs, strict=True)]
        weights = torch.linspace(-1, 2, outputs[0].numel()).view(outputs[0].shape)
        sum((weights * output).sum() for output in outputs).backward()
        return outputs, {name: p.grad for name, p in module.named_parameters()}

    (ours, gradients), (expected, expected_gradients) = run(shared=True), run(shared=False)
    for output, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(output, value, atol=1e-5, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# The flash path's composition of two kernel calls, with a kernel in plain PyTorch in the place of the GPU's.


def plain_forward(
    query, key, value, query_starts, key_starts, longest_query, longest_key, causal, scaling, window
):  # fmt: skip
    output, log_sums = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    for own, other, probabilities, sums in segments(query, key, query_starts, key_starts, causal, scaling, window):
        repeated = value[other].repeat_interleave(query.shape[1] // value.shape[1], 1)
        output[own] = torch.einsum("hqk,khd->qhd", probabilities(sums), repeated)
        log_sums[:, own] = sums
    longest = (query_starts.diff().max(), key_starts.diff().max())
    assert (longest_query, longest_key) == longest, "a kernel would read too little"
    return output, log_sums


def plain_backward(
    gradient, query, key, value, output, log_sums, query_starts, key_starts, _, __, causal, scaling, window
):  # fmt: skip
    """From given log-sums, as the kernel does it: P = exp(scores - log_sums), dS = P (dO V^T - sum(dO O))."""
    groups = query.shape[1] // key.shape[1]
    gradients = [torch.zeros_like(t) for t in (query, key, value)]
    for own, other, probabilities, _ in segments(query, key, query_starts, key_starts, causal, scaling, window):
        p = probabilities(log_sums[:, own])
        k, v = (t[other].repeat_interleave(groups, 1) for t in (key, value))
        delta = (gradient[own] * output[own]).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", gradient[own], v) - delta) * scaling
        gradients[0][own] = torch.einsum("hqk,khd->qhd", ds, k)
        for whole, part in ((gradients[1], torch.einsum("hqk,qhd->khd", ds, query[own])),
                            (gradients[2], torch.einsum("hqk,qhd->khd", p, gradient[own]))):  # fmt: skip
            whole[other] = part.unflatten(1, (-1, groups)).sum(2)
    return tuple(gradients)


def segments(query, key, query_starts, key_starts, causal, scaling, window):
    """Places of each segment's queries and keys, its probabilities for given log-sums, and its own log-sums. As the
    kernel does, a causal segment's last query is at its last key, and sees `window` keys if that is not 0."""
    groups = query.shape[1] // key.shape[1]
    for index in range(len(query_starts) - 1):
        own = slice(int(query_starts[index]), int(query_starts[index + 1]))
        other = slice(int(key_starts[index]), int(key_starts[index + 1]))
        scores = torch.einsum("qhd,khd->hqk", query[own], key[other].repeat_interleave(groups, 1)) * scaling
        if causal:
            queries, keys = scores.shape[-2:]
            back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            scores = scores.masked_fill((back < 0) | (back >= (window or keys)), -torch.inf)
        yield own, other, lambda sums, s=scores: (s - sums.unsqueeze(-1)).exp(), scores.logsumexp(-1)


@pytest.fixture
def plain_kernel(monkeypatch):
    monkeypatch.setattr(flash, "_kernel_forward", plain_forward)
    monkeypatch.setattr(flash, "_kernel_backward", plain_backward)


# A window of 2 tokens is shorter than most prompts and answers, one of 14 than a single row; none reaches to 40.
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 7, 14, 40])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "none shared"])
def test_kernel_calls_are_attention_over_prompt_and_answer(plain_kernel, window, sinks, shared):
    """Against the right-padded grid, on which every row is whole."""
    layout = pack(families() if shared else answer_rows([5, 3, 9], [4, 2, 6]), window).layout
    generator = torch.Generator().manual_seed(0)
    tokens = len(layout.place)
    shapes = [(tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 8), (4,)]
    states = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = torch.randn(tokens, 4, 8, generator=generator, dtype=torch.float64)

    def run(compute):
        inputs = [state.clone().requires_grad_() for state in states]
        output = compute(*inputs)
        (weights * output).sum().backward()
        return [output, *(t.grad for t in inputs)]

    def by_kernels(query, key, value, scores):
        return flash.flash(query, key, value, layout, 0.3, layout.window, scores if sinks else None)

    def by_rows(query, key, value, scores):
        grid = (layout.source, layout.place, layout.rows, layout.width)
        return attention._on_grid(query, key, value, *grid, 0.3, layout.window, None, scores if sinks else None)

    assert layout.window == (window if window < 15 else 0)
    for ours, expected in zip(run(by_kernels), run(by_rows), strict=True):
        if expected is None:
            assert ours is None and not sinks
            continue
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


LAYOUTS = {
    "shared": families(),
    "none shared": answer_rows([3, 8, 5], [6, 2, 4]),
    "shared, other lengths": families().select([1, 2, 4, 5, 3]),
    "none shared, other lengths": answer_rows([2, 9], [3, 7]),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_on_the_flash_path_is_that_on_the_grid(plain_kernel, monkeypatch, compiled):
    """Compiled, layouts with shared prompts have their graphs, those without have theirs, and lengths take no more."""
    torch._dynamo.reset()
    counters.clear()
    modules = {on: PolicyModel(causal_lm()) for on in (False, True)}
    if compiled:
        compile_layers(modules[True].hf)
    graphs = []
    for name, rows in LAYOUTS.items():
        results = []
        for on, module in modules.items():
            monkeypatch.setattr(attention, "has_kernel", lambda *_, on=on: on)
            module.zero_grad()
            output = module(rows, 0.7)[0]
            (torch.linspace(-1, 2, output.numel()).view(output.shape) * output).sum().backward()
            results.append([output, *(p.grad for p in module.parameters())])
        for expected, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == ([1, 2, 2, 2] if compiled else [0, 0, 0, 0])


@pytest.mark.parametrize("window", [0, 4])
def test_the_kernels_take_what_they_are_given(window):
    """On the meta device, which checks arguments and shapes and computes nothing."""
    layout = pack(families()).layout
    states = [torch.empty(len(layout.place), heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
    segments = (layout.starts.to("meta"), layout.starts.to("meta"), layout.longest, layout.longest, True, 0.1, window)
    output, log_sums = flash._kernel_forward(*states, *segments)
    assert output.shape == states[0].shape and log_sums.shape == (4, len(layout.place))
    gradients = flash._kernel_backward(output, *states, output, log_sums, *segments)
    assert [g.shape for g in gradients] == [s.shape for s in states]
