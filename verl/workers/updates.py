"""Shared by the actor's and the discriminator's updates: micro-batches, totals over ranks, optimizer, schedule."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LRScheduler

from verl.config import OptimizerConfig
from verl.models.answer_models import AnswerModel
from verl.models.packing import AnswerRows
from verl.utils.finite import non_finite_names
from verl.utils.seqlen_balancing import rearrange_micro_batches
from verl.utils.torch_functional import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_wsd_schedule_with_warmup,
)

logger = logging.getLogger(__name__)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101, algorithm 2) on this rank's shards as plain tensors.

    It works element by element, so that the result is the same. Of distributed tensors each list is taken apart and put
    together by Python in every step, while the device waits.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient; its state was made beforehand (`_make_states`)."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            beta1, beta2 = group["betas"]
            adamw(
                own_shards(parameters),
                own_shards(parameter.grad for parameter in parameters),
                own_shards(first),
                own_shards(second),
                [],
                steps,
                foreach=group["foreach"],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@torch.no_grad()
def own_shards(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of each, which shares its memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def build_optimizer(module: nn.Module, config: OptimizerConfig, total_steps: int) -> tuple[ShardedAdamW, LRScheduler]:
    """AdamW over all parameters that are not frozen, and the schedule that is stepped once per training step."""
    optimizer = ShardedAdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        # One pass over the memory instead of several. On CPU it would change nothing but the last bit.
        fused=next(module.parameters()).is_cuda,
    )
    _make_states(optimizer)
    total = total_steps if config.total_training_steps in (None, -1) else config.total_training_steps
    warmup = config.lr_warmup_steps
    if warmup < 0:
        warmup = int(config.lr_warmup_steps_ratio * total)
    if config.lr_scheduler_type == "constant":
        return optimizer, get_constant_schedule_with_warmup(optimizer, warmup)
    if config.lr_scheduler_type == "cosine":
        schedule = get_cosine_schedule_with_warmup(
            optimizer, warmup, total, min_lr_ratio=config.min_lr_ratio, num_cycles=config.num_cycles
        )
        return optimizer, schedule
    schedule = get_wsd_schedule_with_warmup(
        optimizer, warmup, total, min_lr_ratio=config.min_lr_ratio, num_cycles=config.num_cycles
    )
    return optimizer, schedule


def _make_states(optimizer: ShardedAdamW) -> None:
    """Allocate AdamW's state now instead of on its first step.

    The state stays for good. By the first step PyTorch holds large pieces of GPU memory that activations were in, and
    would put the state into them: the rest of those pieces could not be given back for the engine.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def optimizer_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, loss: torch.Tensor | float = 0.0
) -> float:
    """Clip the gradients' total norm over all ranks, step, and return the norm before clipping; collective.

    Args:
        loss: this rank's, whose gradients these are.

    Raises:
        FloatingPointError: the norm, or the loss of any rank, is not finite. The weights are left as they were, on
            every rank, and so is the optimizer.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = total_norm(gradients)
    losses, broken = sum_over_ranks([float(loss), not (math.isfinite(norm) and math.isfinite(loss))])
    if broken:
        raise FloatingPointError(
            f"the loss is {losses / world_size():.6g} and the gradient norm {norm:.6g}, so the update was not "
            f"applied; {_what_is_not_finite(module)}"
        )
    # As torch's clip_grads_with_norm_ scales them.
    scale = max_norm / (norm + 1e-6)
    if gradients and scale < 1:
        torch._foreach_mul_(own_shards(gradients), scale)
    optimizer.step()
    return norm


def total_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The L2 norm of all gradients as one vector, of sharded ones over all ranks; collective then."""
    norm = nn.utils.get_total_norm(own_shards(gradients))
    if gradients and isinstance(gradients[0], DTensor):
        squares = norm.double().square()
        dist.all_reduce(squares, group=gradients[0].device_mesh.get_group())
        norm = squares.sqrt()
    return norm.item()


def _what_is_not_finite(module: nn.Module) -> str:
    """The trained weights, or the gradients where all of these are finite, in words; collective."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for kind, tensors in (("weights", weights), ("gradients", gradients)):
        if names := non_finite_names(tensors):
            return f"{len(names)} of {len(tensors)} {kind} are not finite, e.g. {names[0]}"
    return "all trained weights and gradients are finite"


def step_or_skip(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    loss: torch.Tensor | float,
    metrics: MetricSums,
) -> None:
    """`optimizer_step`, left out on all ranks where it would not be finite. It counts as one of `{name}/skipped_steps`
    then; otherwise its norm is in `{name}/grad_norm`. `name` is the model's, `actor` or `critic`."""
    try:
        norm = optimizer_step(module, optimizer, max_norm, loss)
    except FloatingPointError as error:
        metrics.count(f"{name}/skipped_steps")
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning("%s: %s", name, error)
        return
    metrics.add({f"{name}/grad_norm": norm}, 1.0)


def split_micro_batches(
    lengths: list[int],
    use_dynamic_bsz: bool,
    max_tokens: int,
    micro_batch_size: int | None,
    shared: list[int] | None = None,
) -> list[list[int]]:
    """The indices of each micro-batch's rows, or groups, whose tokens are `lengths`; every rank gets as many
    micro-batches.

    With `use_dynamic_bsz` they are filled up to `max_tokens`, else they hold `micro_batch_size` rows. FSDP's
    collectives run once per micro-batch, so ranks with fewer would leave the others waiting. `shared`: see
    `rearrange_micro_batches`.
    """
    if use_dynamic_bsz:
        group = dist.group.WORLD if dist.is_initialized() else None
        return rearrange_micro_batches(lengths, max_tokens, dp_group=group, shared=shared)
    rows = list(range(len(lengths)))
    return [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]


def split_rows(
    rows: AnswerRows, module: AnswerModel, use_dynamic_bsz: bool, max_tokens: int, micro_batch_size: int | None
) -> list[list[int]]:
    """`split_micro_batches` of rows; a prompt that the module computes once for several answers counts once, and
    `max_tokens` are those of each rank that shares a sequence."""
    shared = rows.shared_prompts() if module.remove_padding else None
    max_tokens *= module.sequence_parallel_size
    return split_micro_batches(rows.lengths(), use_dynamic_bsz, max_tokens, micro_batch_size, shared)


@dataclass
class Work:
    """Tokens that an update has computed, one number per sequence and epoch.

    lengths: real tokens of each sequence, its prompt's included.
    repeated: prompt tokens that a sequence has from another one: computed once, they count once.
    """

    lengths: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)

    def add(self, rows: AnswerRows) -> None:
        """Count these rows; a prompt that follows its like is repeated."""
        self.lengths += rows.lengths()
        self.repeated += rows.shared_prompts()


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def data_parallel_size(module: AnswerModel) -> int:
    """The number of shares of a batch: ranks, or groups of ranks that have the same rows and share their tokens."""
    return world_size() // module.sequence_parallel_size


def sum_over_ranks(values: Iterable[float]) -> list[float]:
    """Sum each value over all ranks."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def sum_over_shares(values: Iterable[float], module: AnswerModel) -> list[float]:
    """Sum each value over the shares of a batch (`data_parallel_size`), whose ranks have one and the same."""
    return [total / module.sequence_parallel_size for total in sum_over_ranks(values)]


def _names_on_any_rank(own: Iterable[str]) -> list[str]:
    if not dist.is_initialized():
        return sorted(own)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, list(own))
    return sorted(set().union(*everyones))


class MetricSums:
    """Means of metrics over parts of different weight, over all ranks: the exact mean, however it was split.

    Values on a GPU stay there until the means are asked for: reading one would make the host wait for the device, and
    the device then for the host.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._weights: dict[str, list[float]] = defaultdict(list)
        self._counts: dict[str, float] = defaultdict(float)

    def count(self, name: str) -> None:
        """Count one more of what happens on all ranks at once."""
        self._counts[name] += 1

    def add(self, metrics: Mapping[str, torch.Tensor | float], weight: float) -> None:
        """Add the means over a part that counts `weight` (tokens, sequences or pairs)."""
        for name, value in metrics.items():
            self._values[name].append(torch.as_tensor(value).detach())
            self._weights[name].append(weight)

    def means(self) -> dict[str, float]:
        """The means over everything added on all ranks, and what was counted; collective. A metric that some ranks or
        parts do not have is the mean over those that do."""
        names = _names_on_any_rank(self._values)
        sums = []
        for name in names:
            weights = torch.tensor(self._weights[name], dtype=torch.float64)
            values = torch.stack(self._values[name]).double().cpu() if len(weights) else torch.zeros(0).double()
            sums.append((values @ weights).item())
        totals = sum_over_ranks([*sums, *(sum(self._weights[name]) for name in names)])
        return {name: totals[i] / totals[len(names) + i] for i, name in enumerate(names)} | dict(self._counts)
