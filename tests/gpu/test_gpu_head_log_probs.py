"""The LM head on a GPU, where its elementwise parts are compiled, against torch's softmax and autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from verl.models import head_log_probs as module
from verl.models.head_log_probs import head_log_probs
from verl.models.logits import PLAIN_LOGITS, LogitForm

TOKENS, HIDDEN, VOCAB = 300, 64, 15_193


@pytest.mark.parametrize("memory", ["kept", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [PLAIN_LOGITS, LogitForm(0.5, 3.0)], ids=str)
def test_values_and_gradients_are_autograds(form, dtype, memory, cuda, monkeypatch):
    if memory == "chunked":
        monkeypatch.setattr(module, "_has_room", lambda *_: False)
        monkeypatch.setattr(module, "CHUNK_BYTES", 77 * VOCAB * 4)
    generator = torch.Generator(cuda).manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, device=cuda).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(VOCAB, HIDDEN, generator=generator, device=cuda)).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator, device=cuda)
    weights = torch.linspace(-1, 2, TOKENS, device=cuda)

    log_probs, entropies = head_log_probs(hidden, weight, None, targets, 0.7, "grad", form)
    (weights * log_probs + 0.1 * entropies).sum().backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = exact_hidden @ exact_weight.T * form.scale
    logits = form.cap * torch.tanh(logits / form.cap) if form.cap else logits
    log_p = torch.log_softmax(logits / 0.7, -1)
    exact_log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    exact_entropies = -(log_p.exp() * log_p).sum(-1)
    (weights * exact_log_probs + 0.1 * exact_entropies).sum().backward()

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, exact in (
        (log_probs, exact_log_probs),
        (entropies, exact_entropies),
        (hidden.grad, exact_hidden.grad),
        (weight.grad, exact_weight.grad),
    ):
        assert (ours.double() - exact).norm() / exact.norm() < tolerance


def test_chunks_hold_the_memory_down(cuda, monkeypatch):
    hidden = torch.randn(8192, HIDDEN, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCAB, (8192,), device=cuda)
    logits = 8192 * VOCAB * 2
    peaks = {}
    for kept in (True, False):
        monkeypatch.setattr(module, "_has_room", lambda *_, kept=kept: kept)
        monkeypatch.setattr(module, "CHUNK_BYTES", logits // 8)
        head_log_probs(hidden, weight, None, targets)[0].sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        head_log_probs(hidden, weight, None, targets)[0].sum().backward()
        peaks[kept] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] < 1.3 * logits, "more than the logits once"
    assert peaks[False] < 0.5 * logits
