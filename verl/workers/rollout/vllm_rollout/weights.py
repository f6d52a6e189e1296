"""Whole tensors into a vLLM engine's weights, in place, one at a time."""

from __future__ import annotations

import itertools

import torch
from transformers import PretrainedConfig, PreTrainedModel
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from verl.models.loading import empty_model, persistent_buffers
from verl.models.published import Weights


def structure(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The language model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return empty_model(config, "policy", trust_remote_code)


def restore_calls(model: PreTrainedModel) -> None:
    """Let the classes of `model` be called as before the engine started, by instances that are not the engine's.

    Families that vLLM has no code for it runs by their transformers classes, whose `__call__` it replaces by one that
    knows its own instances only; the trainer's model in this process may be another.
    """
    for module in model.modules():
        owner = type(module)
        if owner.__call__.__module__.startswith("vllm.") and not hasattr(owner, "do_not_compile"):
            # What the engine's own instances have been told stands in them.
            owner.do_not_compile = True


def tensor_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shapes of a model's parameters and persistent buffers by name; tied ones come once."""
    tensors = itertools.chain(model.named_parameters(), persistent_buffers(model))
    return {name: tensor.shape for name, tensor in tensors}


class PushCheck:
    """A filter that lets exactly the expected tensors through, each once, and says afterwards what was wrong.

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
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            # A tied head gets no tensor of its own, so nothing has repacked it.
            method.process_weights_after_loading(module)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if worker.device.type == "cpu" and experts is not None:
            # Experts are repacked with the first weights only, and the CPU's kernel would take others for repacked.
            experts.process_weights_after_loading(module)
