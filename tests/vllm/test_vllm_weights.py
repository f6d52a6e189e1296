"""What of a push a reload by vLLM leaves out, on modules of a few numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.vllm


class Model(nn.Module):
    """A layer that loads by vLLM's loader, one that copies one of its two tensors itself, one that copies its only one,
    and a router whose only parameter is the bias of its choices, which a reload leaves where it is."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader
        for name, tensors in {
            "plain": ["weight"], "mixed": ["weight", "sink"], "own": ["sink"], "router": ["e_score_correction_bias"]
        }.items():  # fmt: skip
            layer = nn.Module()
            for tensor in tensors:
                layer.register_parameter(tensor, nn.Parameter(torch.zeros(4), requires_grad=False))
            self.add_module(name, layer)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name.endswith("sink"):
                parameters[name].data.copy_(tensor)
            else:
                getattr(parameters[name], "weight_loader", self.loader)(parameters[name], tensor)


def test_what_is_copied_past_the_loaders_is_named_and_nothing_else():
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    from verl.workers.rollout.vllm_rollout.weights import reload_weights

    model = Model(default_weight_loader)
    layerwise.record_metadata_for_reloading(model)
    text_config = SimpleNamespace(tie_word_embeddings=False)
    model_config = SimpleNamespace(dtype=torch.float32, hf_config=SimpleNamespace(get_text_config=lambda: text_config))

    def reload(weights_iterator, is_checkpoint_format):
        layerwise.initialize_layerwise_reload(model)
        model.load_weights(weights_iterator)
        layerwise.finalize_layerwise_reload(model, model_config)

    worker = SimpleNamespace(
        get_model=lambda: model, model_config=model_config, reload_weights=reload, device=torch.device("cpu")
    )
    ones = [(name, torch.ones(4)) for name, _ in model.named_parameters()]
    assert reload_weights(worker, iter(ones)) == ["mixed.sink", "own.sink"]
    for name in ("plain.weight", "mixed.weight", "router.e_score_correction_bias"):
        assert model.get_parameter(name).tolist() == [1.0] * 4, name
