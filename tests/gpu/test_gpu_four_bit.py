"""Weights in 4 bits on a GPU: what a CPU packed, unpacked and multiplied by the library's own kernels."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.adapters import adapter_config, train_a_little
from tests.gpu.shapes import language_model
from verl.models.adapters import add_adapters
from verl.models.four_bit import Linear4bit, put_in_4bit, round_to_4bit, whole_weight
from verl.models.layers import compile_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 192])
@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_a_layer_is_the_rounded_one(cuda, dtype, tokens, outputs):
    """Few tokens and many may take different kernels."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(320, outputs)
    layer = Linear4bit(plain, dtype, values=True)
    weight = whole_weight(layer)
    layer = layer.to(cuda)
    layer.bias.data = layer.bias.data.to(dtype)
    assert torch.equal(whole_weight(layer).cpu(), weight)
    inputs = torch.randn(tokens, 320, device=cuda).to(dtype).requires_grad_()
    slope = torch.randn(tokens, outputs, device=cuda).to(dtype)
    (found,) = torch.autograd.grad(layer(inputs), inputs, slope)
    exact = torch.nn.functional.linear(inputs.double(), weight.to(cuda).double(), layer.bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, expected in ((layer(inputs), exact), (found, slope.double() @ weight.to(cuda).double())):
        assert (ours.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_adapters_are_those_beside_rounded_weights(cuda, compiled):
    """In fp32, on the CPU and a plain model; compiled as training has it."""
    base = language_model("qwen2").float()
    plain, packed = copy.deepcopy(base), base
    round_to_4bit(plain, torch.float32)
    ids = torch.arange(4, 68).view(2, 32)
    for model, device in ((plain, "cpu"), (packed, cuda)):
        torch.manual_seed(1)  # what adapters begin with is drawn
        # At the tests' own scale, three, so wide a model's gradients follow the rounding of its weights.
        add_adapters(model, adapter_config(lora_alpha=1))
        if model is packed:
            put_in_4bit(model, torch.float32)
        train_a_little(model)
        model.to(device).train()
        if compiled and model is packed:
            compile_layers(model)
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad.cpu() for name, p in packed.named_parameters() if p.grad is not None}
    assert expected and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
