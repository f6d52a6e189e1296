"""An out-of-memory error that says which settings to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl.config import ActorRolloutRefConfig, CriticConfig
from verl.memory.knobs import Phase, knobs
from verl.utils.units import GIB

OPENINGS = GPU, HOST = "The GPU's memory is full in ", "The machine's memory is full in "


@contextmanager
def explain_out_of_memory(phase: Phase, settings: ActorRolloutRefConfig | CriticConfig) -> Iterator[None]:
    """Prefix any out-of-memory error raised inside the block with the settings that would help.

    An engine that allocates beside PyTorch raises a plain RuntimeError where PyTorch has a type of its own.

    Raises:
        torch.OutOfMemoryError: with the phase, settings by key and present value, what is allocated, and the original
            text; the original error is its cause. Other errors pass as they are.
        MemoryError: the same, where it is the machine's memory that is full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if any(opening in text for opening in OPENINGS):
            raise
        if _is_of_the_host(error):
            raise MemoryError(f"{HOST}{phase}: {_host_advice(phase, settings)}. {text}") from error
        if not _is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{GPU}{phase}: {_advice(phase, settings)}. {_allocated()}{text}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _is_of_the_host(error: RuntimeError | MemoryError) -> bool:
    # PyTorch's allocator, and C++'s own.
    said = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)


def _host_advice(phase: Phase, settings: ActorRolloutRefConfig | CriticConfig) -> str:
    advice = ["use fewer processes on this machine (trainer.n_gpus_per_node)"]
    if torch.cuda.is_available():
        advice.append("let less rest in its memory (fsdp_config: param_offload, optimizer_offload)")
        return ", or ".join(advice)
    found = (
        knobs(phase, settings, None) if isinstance(settings, ActorRolloutRefConfig) else knobs(phase, None, settings)
    )
    # Offloading is from a GPU to this memory.
    return ", or ".join([*(f"set {knob}" for knob in found if "_offload" not in knob.key), *advice])


def _advice(phase: Phase, settings: ActorRolloutRefConfig | CriticConfig) -> str:
    if isinstance(settings, CriticConfig):
        found = knobs(phase, None, settings)
        others = "actor_rollout_ref.{actor,ref}.fsdp_config"
    else:
        found = knobs(phase, settings, None)
        others = "critic.model.fsdp_config"
    advice = [f"set {knob}" for knob in found]
    advice.append(f"offload what rests beside it ({others}: param_offload, optimizer_offload)")
    return f"{', or '.join(advice)}, or use more GPUs"


def _allocated() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return (
        f"Of {total / GIB:.1f} GiB PyTorch has reserved {torch.cuda.memory_reserved() / GIB:.1f} and uses "
        f"{torch.cuda.memory_allocated() / GIB:.1f} (at most {torch.cuda.max_memory_allocated() / GIB:.1f} so far; "
        f"what an engine gave up in its sleep counts), {free / GIB:.1f} are free; "
        "the rest is CUDA's, NCCL's, vLLM's and other processes'. "
    )
