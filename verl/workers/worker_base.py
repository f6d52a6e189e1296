"""What the workers of a rank share: joining the others, building a trained model, updates, checkpoints, traces."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from verl.config import (
    ActorRolloutRefConfig,
    CriticConfig,
    FSDPConfig,
    ModelConfig,
    OptimizerConfig,
)
from verl.memory.errors import explain_out_of_memory
from verl.memory.estimate import host_memory
from verl.memory.knobs import Phase
from verl.memory.offload import Offloader, build_offloader
from verl.models.adapters import adapter_files, adapters_in
from verl.models.answer_models import AnswerModel
from verl.models.finding import base_of
from verl.models.layers import compile_seconds
from verl.models.loading import Kind, hf_files, quiet_transformers
from verl.models.shape import LIMITS, ModelShape, training_flops
from verl.models.sharding import build_sharded_model
from verl.models.tokenizer import load_tokenizer
from verl.single_controller import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import startup
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.profiling import Trace
from verl.utils.rendezvous import meeting_store
from verl.workers.updates import Work, build_optimizer, sum_over_ranks, world_size

# Where no run says otherwise.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class FSDPWorker(Worker):
    """The part that the actor's and the critic's worker share.

    Args:
        mesh_name: of the groups of `sequence_parallel_size` successive ranks, which get the same rows and share their
            tokens.
        collective_timeout: how long ranks wait for each other. The first worker of a process decides.
    """

    config: ActorRolloutRefConfig | CriticConfig
    module: AnswerModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    checkpoint: FSDPCheckpointManager
    offloader: Offloader
    trace: Trace
    shape: ModelShape
    update_seconds: float
    # Seconds in which this process had compiled when its models were built.
    compiled_before: float

    def __init__(
        self,
        device: str,
        seed: int,
        mesh_name: str,
        sequence_parallel_size: int,
        collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
    ):
        super().__init__()
        share, place = divmod(self.rank, sequence_parallel_size)
        self.register_dispatch_collect_info(mesh_name, share, is_collect=place == 0)
        self.device = device
        backend = "gloo"
        if device == "cuda":
            self.device = f"cuda:{self.local_rank}"
            torch.cuda.set_device(self.device)
            # The driver's numbers (totals, metrics) are summed in host memory, without waiting for the GPU.
            backend = "cpu:gloo,cuda:nccl"
        quiet_transformers()
        if not dist.is_initialized():
            store = meeting_store(self.rank, self.world_size, collective_timeout)
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=collective_timeout
            )
        # Fresh score heads are drawn from this; every draw during training has a seed of its own.
        torch.manual_seed(seed)

    def _build_trained(
        self,
        model: ModelConfig,
        kind: Kind,
        fsdp: FSDPConfig,
        optim: OptimizerConfig,
        total_steps: int,
        sequence_parallel_size: int,
        base: FSDPWorker | None = None,
    ) -> AnswerModel:
        """Build the module, which is returned, its optimizer and schedule, its checkpoints and its offloading. Its
        frozen weights are those of `base`, if that is given."""
        with nullcontext() if base is None else base.offloader.on_device():
            module = build_sharded_model(
                model, kind, fsdp, self.device, base=None if base is None else base.module,
                sequence_parallel_size=sequence_parallel_size,
            )  # fmt: skip
        self.module = module
        self.optimizer, self.lr_scheduler = build_optimizer(module, optim, total_steps)
        self.shape = ModelShape.of(module.hf.config, kind, model.trust_remote_code, adapters_in(module.hf))
        self.tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
        self.checkpoint = FSDPCheckpointManager(
            module.hf,
            self.optimizer,
            self.lr_scheduler,
            self.tokenizer,
            compute_dtype=getattr(torch, fsdp.dtype),
            base=hf_files(model.path, model.tokenizer_path, model.trust_remote_code),
            adapter_files=adapter_files(module.hf, base_of(model.path), getattr(torch, fsdp.dtype)),
        )
        base_offloader = None if base is None else base.offloader
        self.offloader = build_offloader(module, self.optimizer, fsdp, self.device, base_offloader)
        self.offloader.rest()
        return module

    @contextmanager
    def on_device(self, phase: Phase, updates: bool = False) -> Iterator[None]:
        """Keep the model on the device within the block, with its optimizer if it `updates`."""
        with explain_out_of_memory(phase, self.config), self.offloader.on_device(optimizer=updates):
            yield

    @contextmanager
    def update_on_device(self, phase: Phase) -> Iterator[None]:
        """Keep the model and its optimizer on the device within the block, and time it. The gradients, which take as
        much memory as the weights, are dropped afterwards."""
        with self.on_device(phase, updates=True):
            start = time.perf_counter()
            yield
            self.update_seconds = time.perf_counter() - start
            self.optimizer.zero_grad()

    def finish_update(self) -> float:
        """The learning rate of the training step that ends here; the schedule advances to the next step's."""
        rate = self.lr_scheduler.get_last_lr()[0]
        with warnings.catch_warnings():
            # A resumed run may begin with a step that leaves the update out; its rate is passed over as any other's.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()
        return rate

    def mfu(self, name: str, work: Work) -> dict[str, float]:
        """`perf/mfu/{name}`: the share of the GPU's peak FLOP/s that the last update's work (`training_flops`) amounts
        to, averaged over ranks. Empty without a GPU whose peak is known."""
        if not self.device.startswith("cuda"):
            return {}
        limits, shape = LIMITS.get(torch.cuda.get_device_name(self.device)), self.shape
        if limits is None:
            return {}
        width = shape.heads * shape.head_dim
        flops = training_flops(shape.parameters, shape.layers, width, work.lengths, work.repeated, shape.frozen)
        share = flops / self.module.sequence_parallel_size / (self.update_seconds * limits.flops)
        return {f"perf/mfu/{name}": sum_over_ranks([share])[0] / world_size()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def memory_sizes(self) -> tuple[int, int] | None:
        """Bytes of this rank's GPU and of the memory of its machine or container; None without a GPU."""
        if not self.device.startswith("cuda"):
            return None
        return torch.cuda.get_device_properties(self.device).total_memory, host_memory()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def start_phases(self) -> list[startup.Phase]:
        """What this rank's process has done since its start, and the time in which it has compiled, the engine's own
        compiling apart."""
        return [*startup.phases(), startup.Phase("compiling layers", compile_seconds() - self.compiled_before, 0)]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_trace(self) -> None:
        """Begin to trace all that this rank's process does, for all of its roles."""
        self.trace = Trace(self.device).__enter__()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def end_trace(self, folder: str) -> None:
        """End that trace, and write it with its tables to `rank_N.json.gz` and `rank_N.txt` in the folder."""
        self.trace.__exit__(None, None, None)
        self.trace.keep(Path(folder), f"rank_{self.rank}", f"rank {self.rank} of {self.world_size}")
        del self.trace

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def checkpoint_bytes(self) -> int:
        """Bytes of this model's part of a checkpoint, written by all ranks."""
        return self.checkpoint.size()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, folder: str) -> None:
        """Write this model's part of a checkpoint."""
        with self.offloader.on_device(optimizer=True):
            self.checkpoint.save_checkpoint(folder)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reserve_for_checkpoints(self) -> None:
        """Take the host memory that checkpoints are copied into before they are written in the background."""
        with self.offloader.on_device(optimizer=True):
            self.checkpoint.reserve()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_checkpoint(self, folder: str) -> None:
        """Copy this model's part of a checkpoint, and begin to write the copy in the background."""
        with self.offloader.on_device(optimizer=True):
            self.checkpoint.begin_checkpoint(folder)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def checkpoint_is_written(self) -> bool:
        """Whether this rank has written what `begin_checkpoint` began. Raises what kept it from it."""
        return self.checkpoint.is_written()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, folder: str) -> None:
        """Restore this model's part of a checkpoint."""
        with self.offloader.on_device(optimizer=True):
            self.checkpoint.load_checkpoint(folder)
