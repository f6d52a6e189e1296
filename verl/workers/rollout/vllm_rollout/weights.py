"""Whole tensors into a vLLM engine's weights, in place, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PretrainedConfig
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from verl.utils.model import empty_model

Weights = Iterator[tuple[str, torch.Tensor]]


def parameter_shapes(config: PretrainedConfig, trust_remote_code: bool) -> tuple[str, dict[str, torch.Size]]:
    """Class name of the language model that `config` describes, and its parameters; tied ones come once."""
    with torch.device("meta"):
        model = empty_model(config, "policy", trust_remote_code)
    return type(model).__name__, {name: parameter.shape for name, parameter in model.named_parameters()}


class PushCheck:
    """Lets exactly the expected tensors through, each once, and says afterwards what was wrong.

    It never raises while tensors flow: every rank must exhaust the iterator, which is collective, and an engine that is
    interrupted half way could not be loaded again.
    """

    def __init__(self, expected: dict[str, torch.Size]):
        self.missing = dict(expected)
        self.problems: list[str] = []

    def through(self, weights: Weights) -> Weights:
        """The tensors that are right."""
        for name, tensor in weights:
            shape = self.missing.pop(name, None)
            if shape is None:
                self.problems.append(f"{name!r} is not a parameter of the rollout model, or came twice")
            elif tensor.shape != shape:
                self.problems.append(f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            else:
                yield name, tensor

    def verify(self) -> None:
        """ValueError unless exactly the expected tensors came."""
        if self.missing:
            self.problems.append(f"{len(self.missing)} weights were not pushed, e.g. {sorted(self.missing)[:3]}")
        if self.problems:
            more = f" (and {len(self.problems) - 3} more)" if len(self.problems) > 3 else ""
            raise ValueError("pushed weights: " + "; ".join(self.problems[:3]) + more)


def keeps_checkpoint_layout(worker) -> bool:
    """Whether the worker's kernels read weights as checkpoints have them, so that loading is copying.

    The CPU build repacks linear layers. Experts, quantized layers and MLA derive tensors from what was loaded.
    """
    if worker.device.type != "cuda":
        return False
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for module in worker.get_model().modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, MLAAttention) or not (method is None or isinstance(method, plain)):
            return False
    return True


def copy_weights(worker, weights: Weights) -> None:
    """Load tensor by tensor into the weights' own memory: right where `keeps_checkpoint_layout`.

    The addresses that CUDA graphs captured stay valid, and nothing is buffered. `reload_weights` would give the same,
    but takes every layer apart into meta tensors, fills a second copy of it, and copies that back.
    """
    worker.get_model().load_weights(weights)


def reload_weights(worker, weights: Weights) -> None:
    """Load layer by layer, repack each layer as its kernels want it, and copy the result to where it was."""
    worker.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            # A tied head gets no tensor of its own, so nothing has repacked it.
            module.quant_method.process_weights_after_loading(module)
