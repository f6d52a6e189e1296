"""Moving a model's sharded parameters and its optimizer's states to host memory while they are not in use.

Only the memory behind a tensor comes and goes: the storage is shrunk to nothing after it was copied, and grown again
before it is copied back. Tensors and storages stay the objects they were, so FSDP2's flat views of the shards, tied
weights and the optimizer's references need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from verl.config import FSDPConfig
from verl.models.sharding import reshard
from verl.utils.host_memory import ALIGNMENT, host_buffer


class HostCopy:
    """The tensors of a collection, on their device or in host memory, moved as one.

    Each storage moves whole and once, however many tensors look into it. The collection is asked for anew each time it
    goes out, so it may grow or be replaced in between (an optimizer's states after its first step or a checkpoint).
    The host buffer is kept and reused while the sizes stay the same; it is pinned for CUDA tensors.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]):
        self._tensors = tensors
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._out: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self._users = 0

    @property
    def is_out(self) -> bool:
        """Whether there are tensors whose contents are in host memory."""
        return bool(self._out)

    def to_host(self) -> None:
        """Copy everything out and give the device its memory back; nothing happens to what is out already."""
        if self.is_out:
            return
        storages = {storage._cdata: storage for storage in map(_storage, self._tensors()) if storage.nbytes()}
        out = list(zip(storages.values(), self._host_parts(list(storages.values())), strict=True))
        for storage, part in out:
            part.copy_(_as_bytes(storage), non_blocking=True)
        on_cuda = any(storage.device.type == "cuda" for storage, _ in out)
        if on_cuda:
            # The copies must have ended, and so must whatever FSDP's own streams still read.
            torch.cuda.synchronize()
        for storage, _ in out:
            storage.resize_(0)
        self._out = out
        if on_cuda:
            # The engine allocates beside PyTorch and cannot use what its allocator keeps.
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Bring everything back; nothing happens to what is there."""
        for storage, part in self._out:
            storage.resize_(part.numel())
            _as_bytes(storage).copy_(part, non_blocking=True)
        self._out = []

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the tensors on the device within the block, and in host memory after the outermost such block.

        After an exception everything stays where it is: it may be a half-done update.
        """
        self.to_device()
        self._users += 1
        try:
            yield
        except BaseException:
            self._users -= 1
            raise
        self._users -= 1
        if self._users == 0:
            self.to_host()

    def _host_parts(self, storages: list[torch.UntypedStorage]) -> list[torch.Tensor]:
        """A part of the host buffer for each storage."""
        starts, total = [], 0
        for storage in storages:
            starts.append(total)
            total += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        if total != self._buffer.numel():
            pinned = any(storage.device.type == "cuda" for storage in storages)
            if pinned:
                # The copies of the last return may still be reading the old buffer.
                torch.cuda.synchronize()
            # The old one goes first: both at once may be more than the host has.
            del self._buffer
            self._buffer = host_buffer(total, pinned)
        return [self._buffer[start : start + s.nbytes()] for start, s in zip(starts, storages, strict=True)]


class Offloader:
    """The place of a model's parameters and its optimizer's states: in host memory between uses, each if asked for.

    Without either flag nothing is ever moved. A forward, a state dict or an optimizer step while the tensors it needs
    are out raises RuntimeError instead of reading freed memory.

    Args:
        module: plain or sharded by `fully_shard`.
        optimizer: None for a frozen model.
        base: that of the model whose frozen parameters this one computes with: it moves them, and has them on the
            device whenever these parameters are.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        params: bool,
        optimizer_states: bool,
        base: Offloader | None = None,
    ):
        self._module = module
        self._optimizer = optimizer
        self._base = base
        self._params = HostCopy(self._resting_parameters) if params else None
        self._states = HostCopy(self._optimizer_states) if optimizer_states and optimizer is not None else None
        if self._params is not None or base is not None:
            module.register_forward_pre_hook(self._refuse_if_out, prepend=True)
            for part in module.modules():
                part.register_state_dict_pre_hook(self._refuse_if_out)
        if optimizer is not None:
            optimizer.register_step_pre_hook(self._refuse_if_anything_out)
            optimizer.register_state_dict_pre_hook(self._refuse_if_anything_out)

    @contextmanager
    def on_device(self, optimizer: bool = False) -> Iterator[None]:
        """Keep the parameters, and with `optimizer` its states, on the device within the block. Blocks may be nested.

        A block with `optimizer` is a whole update: gradients that are left at its end are spent, and dropped where
        anything is offloaded.

        Raises:
            RuntimeError: at the end of a block without `optimizer`, if parameters that are to go out have gradients.
        """
        parts = [self._params] + ([self._states] if optimizer else [])
        with ExitStack() as stack:
            if self._base is not None:
                stack.enter_context(self._base.on_device())
            for part in parts:
                if part is not None:
                    stack.enter_context(part.on_device())
            yield
            if optimizer and any(part is not None for part in parts):
                self._module.zero_grad()

    def rest(self) -> None:
        """Send everything that may go to host memory there, after a model has been built."""
        for part in (self._params, self._states):
            if part is not None:
                part.to_host()

    def _resting_parameters(self) -> Iterator[torch.Tensor]:
        """The shards, once the gathered weights that a forward left are freed."""
        reshard(self._module)
        for name, parameter in self._module.named_parameters():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"{name} has a gradient, which would stay on the device while the parameters leave it: "
                    "call zero_grad() first, or put the whole update inside `with offloader.on_device(optimizer=True)`"
                )
            if parameter.requires_grad or self._base is None:
                yield parameter.detach()

    def _optimizer_states(self) -> Iterator[torch.Tensor]:
        """State tensors on the parameters' device: a step count that is kept on the host stays as it is."""
        for parameter, state in self._optimizer.state.items():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.device == parameter.device:
                    yield value

    @property
    def is_out(self) -> bool:
        """Whether parameters that the module computes with are in host memory."""
        own = self._params is not None and self._params.is_out
        return own or (self._base is not None and self._base.is_out)

    def _refuse_if_out(self, *_: Any) -> None:
        if self.is_out:
            raise RuntimeError("the parameters are in host memory: use them inside `with offloader.on_device()`")

    def _refuse_if_anything_out(self, *_: Any) -> None:
        self._refuse_if_out()
        if self._states is not None and self._states.is_out:
            raise RuntimeError(
                "the optimizer's states are in host memory: use them inside `with offloader.on_device(optimizer=True)`"
            )


def build_offloader(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    fsdp: FSDPConfig,
    device: str,
    base: Offloader | None = None,
) -> Offloader:
    """The offloader that `param_offload` and `optimizer_offload` ask for. On CPU it moves nothing. `base`: see
    `Offloader`."""
    on_host = device == "cpu"
    return Offloader(
        module,
        optimizer,
        params=fsdp.param_offload and not on_host,
        optimizer_states=fsdp.optimizer_offload and not on_host,
        base=base,
    )


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
