"""One frozen base in memory for student and discriminator, where both train adapters on it.

The discriminator stays a model of its own: class, adapters, score head, sharding, gathered layers. Only the shards of
its frozen parameters are the student's, the same memory under the same names of the backbone. So its values, gradients
and checkpoints are those of a discriminator with weights of its own, to the bit.

FSDP2 takes parameters that were put in place after `fully_shard` (as `load_state_dict(assign=True)` puts them) when the
module first computes. A shard that is shorter than other ranks', because the rows do not divide by the ranks, is copied
then: of each such parameter the last ranks have a second, small one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.config import ActorRolloutRefConfig, CriticConfig, ModelConfig
from verl.models.adapter_folders import AdapterFolder, find_adapter
from verl.models.adapters import adapters_of, base_in_4bit
from verl.models.answer_models import score_head_name
from verl.models.finding import base_of
from verl.models.loading import Kind, empty_model, load_config
from verl.utils.checkpoint.best_link import behind_best

KEY = "critic.model.share_base"
# PEFT's name of the layer that an adapter is beside.
BESIDE = ".base_layer"

# ---------------------------------------------------------------------------------------------------------------------
# Whether


def shares_base(policy: ActorRolloutRefConfig, critic: CriticConfig) -> bool:
    """Whether the discriminator computes with the student's frozen weights: wherever it can, unless `share_base` says
    otherwise.

    Raises:
        ValueError: `share_base=True`, and it cannot.
    """
    wanted = critic.model.share_base
    if wanted is False:
        return False
    problem = why_not_shared(policy, critic)
    if problem is not None and wanted:
        raise ValueError(f"{KEY}=True: {problem}; or leave {KEY} out, and each has weights of its own")
    return problem is None


def why_not_shared(policy: ActorRolloutRefConfig, critic: CriticConfig) -> str | None:
    """Why the discriminator cannot have the student's frozen weights, and a way out; None if it can."""
    for key, model in (("actor_rollout_ref", policy.model), ("critic", critic.model)):
        if not trains_adapters(model):
            return (
                f"expected adapters on one frozen base, and all weights of {key}.model.path={model.path} are trained: "
                f"set {key}.model.lora_rank"
            )
    bases = [Path(base_of(model.path)).expanduser().resolve() for model in (policy.model, critic.model)]
    if bases[0] != bases[1]:
        return (
            f"expected adapters on one frozen base, and the student's is {bases[0]}, the discriminator's {bases[1]}: "
            "give critic.model.path the student's base, or adapters on it"
        )
    dtypes = policy.actor.fsdp_config.dtype, critic.model.fsdp_config.dtype
    if dtypes[0] != dtypes[1]:
        return (
            f"expected weights of one type, got actor_rollout_ref.actor.fsdp_config.dtype={dtypes[0]} and critic.model."
            f"fsdp_config.dtype={dtypes[1]}: leave the latter out"
        )
    in_4bit = [_in_4bit(model) for model in (policy.model, critic.model)]
    if in_4bit[0] != in_4bit[1]:
        one, other = ("student", "discriminator") if in_4bit[0] else ("discriminator", "student")
        return (
            f"expected weights of one kind, and the {one}'s are in 4 bits, the {other}'s not: set load_in_4bit of "
            "both, or of neither (adapters of a folder keep what they were trained beside)"
        )
    return _other_backbone(policy.model, critic.model)


def trains_adapters(model: ModelConfig) -> bool:
    """Whether adapters are trained in place of the model's weights."""
    return adapters_of(model, _adapter(model)) is not None


def _in_4bit(model: ModelConfig) -> bool:
    return base_in_4bit(model, _adapter(model))


def _adapter(model: ModelConfig) -> AdapterFolder | None:
    """The adapters of the model's folder, which need not be there: that of a model whose memory is estimated is not."""
    return find_adapter(behind_best(Path(model.path).expanduser()))


def _other_backbone(student: ModelConfig, critic: ModelConfig) -> str | None:
    """What the discriminator's class has beside a score head that the student's has not, in a sentence."""
    there, wanted = _empty(student, "policy"), _empty(critic, "score")
    shapes = {name: parameter.shape for name, parameter in there.base_model.named_parameters()}
    own = {name: parameter.shape for name, parameter in wanted.base_model.named_parameters()}
    head = f"{score_head_name(wanted)}."
    prefix = f"{wanted.base_model_prefix}."
    foreign = [name for name, _ in wanted.named_parameters() if not name.startswith((head, prefix))]
    foreign += [name for name, shape in own.items() if shapes.get(name) != shape]
    if not foreign:
        return None
    return (
        f"{type(wanted).__name__} has {len(foreign)} parameters that {type(there).__name__} has not, or of another "
        f"shape, e.g. {foreign[0]}: expected the same backbone (see override_config and trust_remote_code of both)"
    )


def _empty(model: ModelConfig, kind: Kind) -> PreTrainedModel:
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    with torch.device("meta"):
        return empty_model(config, kind, model.trust_remote_code)


# ---------------------------------------------------------------------------------------------------------------------
# How


def drop_base(hf: PreTrainedModel) -> None:
    """Leave of the frozen parameters, in place, their shape and type alone, without memory."""
    for owner in hf.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(owner, name, _frozen(parameter.to("meta")))


def put_on_base(hf: PreTrainedModel, base: PreTrainedModel) -> None:
    """Give a sharded model without its frozen parameters (`drop_base`) those of another, sharded over the same ranks.

    Args:
        base: with the same backbone (`why_not_shared`), with adapters or without, on its device.
    """
    there = {name.replace(BESIDE, ""): parameter for name, parameter in base.base_model.named_parameters()}
    backbone = hf.base_model
    for name, parameter in list(backbone.named_parameters()):
        if not parameter.requires_grad:
            owner, _, own = name.rpartition(".")
            setattr(backbone.get_submodule(owner), own, _frozen(there[name.replace(BESIDE, "")].detach()))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
