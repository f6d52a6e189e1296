"""Are there values that are not finite in a model's tensors, on whatever rank?"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def non_finite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of floating-point tensors that hold an inf or a nan, in their order, whichever rank has it; collective
    over ranks that call with the same names. Sharded tensors are looked at where they are."""
    local = {name: _local(tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    filled = {name: tensor for name, tensor in local.items() if tensor.numel()}
    broken = torch.zeros(len(local))
    if filled:
        # The largest magnitude is nan where one value is: a pass without a copy, and one answer from the device.
        largest = torch.stack([torch.linalg.vector_norm(tensor, float("inf")) for tensor in filled.values()])
        places = torch.tensor([name in filled for name in local])
        broken[places] = (~largest.isfinite()).float().cpu()
    if dist.is_initialized():
        dist.all_reduce(broken)
    return [name for name, number in zip(local, broken.tolist(), strict=True) if number]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
