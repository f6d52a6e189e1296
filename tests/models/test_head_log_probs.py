"""The LM head's log-probs and entropies against torch's own softmax and autograd, kept, chunked and recomputed."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from verl.models import head_log_probs as module
from verl.models.answer_models import PolicyModel
from verl.models.head_log_probs import head_log_probs
from verl.models.logits import PLAIN_LOGITS, LogitForm, logit_form
from verl.models.proof import class_verdict

TOKENS, HIDDEN, VOCAB = 7, 5, 11


def inputs(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator, dtype=dtype) for n in (TOKENS, VOCAB))
    offsets = torch.randn(VOCAB, generator=generator, dtype=dtype) if bias else None
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return [t if t is None else t.requires_grad_() for t in (hidden, weight, offsets)] + [targets]


def by_autograd(hidden, weight, bias, targets, temperature, form=PLAIN_LOGITS):
    logits = torch.nn.functional.linear(hidden, weight, bias) * form.scale
    logits = form.cap * torch.tanh(logits / form.cap) if form.cap else logits
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(params=["kept", "chunked"])
def memory(request, monkeypatch):
    """Logits kept whole, or made again three tokens at a time."""
    if request.param == "chunked":
        monkeypatch.setattr(module, "KEPT_ON_CPU", 0)
        monkeypatch.setattr(module, "CHUNK_BYTES", 3 * VOCAB * 8)
    return request.param


@pytest.mark.parametrize("form", [PLAIN_LOGITS, LogitForm(scale=0.3), LogitForm(cap=2.0), LogitForm(3.0, 1.5)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", ["none", "value", "grad"])
def test_values_and_gradients_are_autograds(memory, bias, entropy, form):
    results = []
    for compute in (head_log_probs, by_autograd):
        arguments = inputs(bias=bias)
        extra = {"entropy": entropy} if compute is head_log_probs else {}
        log_probs, entropies = compute(*arguments, 0.7, form=form, **extra)
        # Weights of their own for every token, as a policy loss gives them.
        weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
        loss = (weights * log_probs).sum()
        if entropy == "grad":
            loss = loss + (weights.flip(0) * entropies).sum()
        loss.backward()
        gradients = [t.grad for t in arguments[:3] if t is not None]
        results.append([log_probs, *([] if entropy == "none" else [entropies]), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_frozen_head_has_no_gradient_and_changes_nobody_elses(memory):
    results = []
    for frozen in (False, True):
        hidden, weight, bias, targets = inputs(bias=True)
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        head_log_probs(hidden, weight, bias, targets)[0].sum().backward()
        results.append(hidden.grad)
        assert (weight.grad is None) == (bias.grad is None) == frozen
    assert torch.equal(*results)


def test_by_hand():
    """Two tokens of a vocabulary of two, logits (0, log 3): probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0)
    log_probs, entropies = head_log_probs(hidden, weight, None, torch.tensor([0, 1]), entropy="value")
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.25, 0.75]))
    expected = 0.25 * torch.tensor(4.0).log() + 0.75 * torch.tensor(4 / 3).log()
    torch.testing.assert_close(entropies, expected.expand(2))


def test_logits_of_bfloat16_are_summed_in_float(memory):
    hidden, weight, _, targets = inputs(torch.bfloat16)
    log_probs, _ = head_log_probs(hidden, weight, None, targets, 0.7)
    logits = torch.nn.functional.linear(hidden, weight)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(
        log_probs, by_autograd(hidden.float(), weight.float(), None, targets, 0.7)[0], atol=0.05, rtol=0.05
    )
    expected = torch.log_softmax(logits.float() / 0.7, -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_no_tokens(memory):
    hidden, weight, _, targets = inputs()
    log_probs, _ = head_log_probs(hidden[:0], weight, None, targets[:0])
    log_probs.sum().backward()
    assert log_probs.shape == (0,)
    assert weight.grad.eq(0).all()


def test_without_gradients_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(module, "_has_room", lambda *_: pytest.fail("nobody will need the logits again"))
    with torch.no_grad():
        head_log_probs(*inputs())


def test_kept_logits_serve_one_backward_pass():
    hidden, weight, _, targets = inputs()
    log_probs, _ = head_log_probs(hidden, weight, None, targets)
    log_probs.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    # Their place was taken by their gradient; a second pass makes them again.
    log_probs.sum().backward()
    torch.testing.assert_close(weight.grad, first)


class Multiplied(GraniteForCausalLM):
    """Multiplies by the entry by which Granite divides, as HyperCLOVA X does."""

    def forward(self, input_ids, **arguments):
        hidden = self.model(input_ids, **arguments).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden) * self.config.logits_scaling)


def test_a_class_says_how_it_makes_logits():
    """Gemma 2 caps them, Granite divides and Cohere multiplies them; Qwen2 reads no such entry."""
    forms = {
        (Gemma2ForCausalLM, Gemma2Config): ({"final_logit_softcapping": 30.0}, LogitForm(cap=30.0)),
        (GraniteForCausalLM, GraniteConfig): ({"logits_scaling": 4.0}, LogitForm(scale=0.25)),
        (Multiplied, GraniteConfig): ({"logits_scaling": 4.0}, LogitForm(scale=4.0)),
        (CohereForCausalLM, CohereConfig): ({"logit_scale": 0.5}, LogitForm(scale=0.5)),
        (Qwen2ForCausalLM, Qwen2Config): ({"logit_scale": 0.5}, PLAIN_LOGITS),
    }
    for (model_class, config_class), (entries, form) in forms.items():
        assert logit_form(model_class, config_class(**entries)) == form
    assert logit_form(Gemma2ForCausalLM, Gemma2Config(final_logit_softcapping=None)) == PLAIN_LOGITS


@pytest.mark.parametrize("model_class", [GraniteForCausalLM, Multiplied])
def test_scales_that_divide_and_multiply_are_hugging_faces(model_class):
    assert class_verdict(PolicyModel, model_class, GraniteConfig(logits_scaling=4.0), True).fault is None


def test_a_cap_by_hand():
    """Head outputs 0 and 4, halved and capped at 1: 0 and tanh(2) = 0.9640; the first has 1 / (1 + e^0.9640)."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
    log_probs, _ = head_log_probs(hidden, weight, None, torch.tensor([0]), form=LogitForm(0.5, 1.0))
    assert log_probs.exp().item() == pytest.approx(0.2761, abs=1e-4)
