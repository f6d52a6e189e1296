"""Whole tensors into a vLLM engine's weights, in place, one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from verl.models.loading import empty_model, persistent_buffers
from verl.models.published import Weights


def structure(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The language model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return empty_model(config, "policy", trust_remote_code)


@contextmanager
def classes_as_they_are(model: PreTrainedModel) -> Iterator[None]:
    """Within, an engine starts; afterwards the classes of `model` are made and called as before, by instances that are
    not the engine's.

    Families that vLLM has no code for it runs by their transformers classes, whose `__init__` and `__call__` it
    replaces by some that know its own instances only; the trainer's models in this process are others, and some of them
    are made later. A second engine of such a family in one process would run uncompiled.
    """
    inits = {type(module): type(module).__init__ for module in model.modules()}
    try:
        yield
    finally:
        for owner, init in inits.items():
            if owner.__init__ is not init:
                owner.__init__ = init
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

    The CPU build repacks linear layers. Quantized layers and MLA derive tensors from what was loaded, and so do kernels
    of experts but for Triton's.
    """
    if worker.device.type != "cuda":
        return False
    return not any(_derives_tensors(module) for module in worker.get_model().modules())


def _derives_tensors(module: nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    if isinstance(method, UnquantizedFusedMoEMethod):
        return method.unquantized_backend is not UnquantizedMoeBackend.TRITON
    plain = method is None or isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))
    return isinstance(module, MLAAttention) or not plain


def copy_weights(worker, weights: Weights) -> list[str]:
    """Load tensor by tensor into the weights' own memory: right where `keeps_checkpoint_layout`. No layer is left out.

    The addresses that CUDA graphs captured stay valid, and nothing is buffered. `reload_weights` would give the same,
    but takes every layer apart into meta tensors, fills a second copy of it, and copies that back.
    """
    worker.get_model().load_weights(weights)
    return []


def reload_weights(worker, weights: Weights) -> list[str]:
    """Load layer by layer, repack each layer as its kernels want it, and copy the result to where it was.

    Returns the parameters that got nothing and hold what they held before, or what happened to be in memory: those that
    a family's code in vLLM copies itself, past the loaders that a reload counts.
    """
    model, left = worker.get_model(), []
    tied = getattr(worker.model_config.hf_config.get_text_config(), "tie_word_embeddings", False)
    worker.reload_weights(weights_iterator=_noting_what_is_left(model, tied, weights, left), is_checkpoint_format=True)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            # A tied head gets no tensor of its own, so nothing has repacked it.
            method.process_weights_after_loading(module)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if worker.device.type == "cpu" and experts is not None:
            # Experts are repacked with the first weights only, and the CPU's kernel would take others for repacked.
            experts.process_weights_after_loading(module)
    return left


def _noting_what_is_left(model: nn.Module, tied: bool, weights: Weights, left: list[str]) -> Weights:
    """The tensors; after the last one `left` gets the parameters that are still on meta and whose loader has not been
    called, but for a tied head's. What a reload does not take apart, a bias of routers say, is never on meta. The model
    has to load each tensor before it asks for the next, as all causal ones of vLLM do."""
    yield from weights
    for name, module in model.named_modules():
        if tied and isinstance(module, ParallelLMHead):
            continue
        loaded = {parameter for parameter, _ in get_layerwise_info(module).loaded_weights}
        own = module.named_parameters(recurse=False)
        left += [f"{name}.{parameter}" for parameter, tensor in own if tensor.is_meta and parameter not in loaded]
