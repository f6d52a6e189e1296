"""The decoder layers of a model, and how they run: compiled, or computed again in the backward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import nn
from torch._dynamo.utils import calculate_time_spent
from transformers import PreTrainedModel

from verl.utils.dataset.cache import cache_folder

# Guards that differ between models and modes (all weights trained or adapters, with or without gradients, a policy or a
# discriminator of another size, a layer with a window or without) each take a graph of the same layer code, and so
# does a micro-batch in which no prompt is shared, or no row exceeds the window, or a section of it (see
# `packing.Layout`) has a single token. Other lengths take none.
RECOMPILE_LIMIT = 64
# Layers of so many kinds at most are compiled with them as constants.
MOST_KINDS = 4
# Where torch and Triton keep what they have compiled, in the environment; and what vLLM sets as it is loaded and built.
KEPT_IN = "TORCHINDUCTOR_CACHE_DIR"
KERNELS_IN = "TRITON_CACHE_DIR"
SET_BY_ENGINES = (KEPT_IN, KERNELS_IN, "TORCHINDUCTOR_COMPILE_THREADS")


def decoder_layers(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, which FSDP shards one by one."""
    classes = set(hf._no_split_modules or [])
    return [child for child in hf.modules() if type(child).__name__ in classes]


def is_recomputed(layer: nn.Module) -> bool:
    """Whether `recompute_layers` chose the layer."""
    return getattr(layer, "gradient_checkpointing", False)


def compile_layers(hf: PreTrainedModel) -> None:
    """Fuse what lies between the matrix products of each layer. All layers share their graphs.

    Only `forward` is compiled: FSDP's and checkpointing's hooks around it stay Python. Shapes are symbols, so that
    micro-batches of every length run on the same few graphs.
    """
    keep_what_is_compiled()
    # The floats of a layer (scales, epsilons) never change. As symbols they have each graph traced up to its kernels,
    # which need them as numbers, and then traced again; what the first time took could be found in no cache.
    torch._dynamo.config.specialize_float = True
    # Nor do its integers, which are constants but where FSDP manages the layer (pytorch/pytorch#194795): with the width
    # of a head as a symbol tracing takes thrice as long, and kernels divide by what they could have known. Where each
    # layer has numbers of its own, as constants they would take a graph each.
    torch._dynamo.config.skip_fsdp_guards = kinds_of_layers(decoder_layers(hf)) > MOST_KINDS
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in decoder_layers(hf):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def kinds_of_layers(layers: Sequence[nn.Module]) -> int:
    """How many there are by the integers of their modules, what stands at the same place in each; their own number,
    which none reads without a cache, aside."""
    values: dict[tuple[type, str, str], set[int]] = {}
    for layer in layers:
        for place, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and name != "layer_idx":
                    values.setdefault((type(module), place, name), set()).add(value)
    return max(map(len, values.values()), default=1)


def keep_what_is_compiled() -> None:
    """Keep it in `compiled/` of this package's cache folder, for later runs, unless the environment names another
    folder or that one cannot be written. By itself torch keeps it in the folder of temporary files."""
    # Not above: whoever compiles nothing need not wait for it.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch itself names its default there as soon as it has asked for it once.
    if os.environ.get(KEPT_IN, default_cache_dir()) == default_cache_dir():
        _keep(KEPT_IN, "compiled")


def _keep(variable: str, name: str) -> None:
    """Have the environment name this folder of the package's cache, which is made, unless it cannot be written."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ[variable] = str(folder)


@contextmanager
def compiler_as_before() -> Iterator[None]:
    """What the block, which loads and builds an engine, sets of torch's compiler for the process is as before
    afterwards: vLLM has it compile in one thread and keep everything in a folder of that one engine.

    Its Triton kernels, which are the same for all engines, go to `kernels/` of this package's cache folder, unless the
    environment names another: compiled for each engine anew, they took 13 s of a start.
    """
    from torch._inductor import config as inductor

    environment, threads = {name: os.environ.get(name) for name in SET_BY_ENGINES}, inductor.compile_threads
    if KERNELS_IN not in os.environ:
        _keep(KERNELS_IN, "kernels")
    try:
        yield
    finally:
        inductor.compile_threads = threads
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compile_seconds() -> float:
    """Seconds in which this process has compiled so far."""
    return calculate_time_spent()["total_wall_time"]


def recompute_layers(hf: PreTrainedModel, share: float) -> None:
    """Checkpoint this share of the layers: keep only their inputs and recompute everything else inside them in the
    backward pass.

    The layers are spread evenly over the depth, the first among them: the last one's turn to be computed again comes
    when everything else is still in memory.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(decoder_layers(hf)):
        layer.gradient_checkpointing = ceil((number + 1) * share) > ceil(number * share)
