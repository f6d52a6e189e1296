"""vLLM in the rank's own process, for GPU runs: vLLM 0.26 to 0.32, and its CPU build for tests.

Ranks that share a tensor-parallel engine are neighbours. Each of them runs the whole engine's schedule on the prompts
of all of them, with its own part of the weights, and returns the answers to its own prompts.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel
from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams, __version__
from vllm.envs import VLLM_CACHE_ROOT
from vllm.plugins import load_general_plugins

from verl.config import SamplingConfig
from verl.models.published import checkpoint_tensors
from verl.protocol import DataProto
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.vllm_rollout.scheduling import make_lean, scheduler_of
from verl.workers.rollout.vllm_rollout.weights import (
    PushCheck,
    classes_as_they_are,
    copy_weights,
    keeps_checkpoint_layout,
    reload_weights,
    structure,
    tensor_shapes,
)

MEMORY_ADVICE = (
    "vLLM did not get the memory that it was promised, or cannot work with so little: change "
    "actor_rollout_ref.rollout.gpu_memory_utilization (the engine's share of the whole device), lower "
    "actor_rollout_ref.rollout.max_num_seqs or max_num_batched_tokens, or offload the trainer's models "
    "(fsdp_config.param_offload, fsdp_config.optimizer_offload)"
)
VLLM_LARGEST_GRAPH = 512
# The memory that vLLM gives up in its sleep and takes back separately.
SLEEPING_MEMORY = frozenset({"weights", "kv_cache"})


class RankPrompts(NamedTuple):
    """One rank's prompts to an engine: token ids, the number of prompts to report log-probs of, and the seed."""

    prompts: list[list[int]]
    reported: int
    seed: int


class VLLMRollout(BaseRollout):
    """One vLLM engine per `tensor_model_parallel_size` ranks. All ranks must build theirs at the same time."""

    def _build(self, model_config: PretrainedConfig, device: str, trust_remote_code: bool) -> None:
        config = self.config
        self.on_gpu = torch.device(device).type == "cuda"
        self.max_model_len = config.max_model_len or config.prompt_length + config.response_length
        self._join_engine()
        self._structure = structure(model_config, trust_remote_code)
        check_family(self._structure)
        load_class(type(self._structure).__name__)
        folder = _model_folder(model_config, type(self._structure).__name__, config.dtype)
        with self._generators(config.seed), classes_as_they_are(self._structure):
            self.llm = self._start(folder, trust_remote_code)
        make_lean(scheduler_of(self.llm))
        if self.on_gpu and config.kv_cache_dtype == "fp8":
            self.llm.collective_rpc(list_cache_tensors)
        in_place = self.llm.collective_rpc(keeps_checkpoint_layout)[0]
        self._load = copy_weights if in_place else reload_weights
        self._has_weights = False
        self._asleep: set[str] = set()
        self.sleep()

    def _join_engine(self) -> None:
        """Find the ranks that share this engine and make a process group of them; every rank creates all of these."""
        size, ranks, rank = self.config.tensor_model_parallel_size, dist.get_world_size(), dist.get_rank()
        if ranks % size:
            key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
            raise ValueError(f"{key}={size} does not divide {ranks} ranks")
        self.engine_number, self.place = divmod(rank, size)
        self.process_group = None
        for first in range(0, ranks, size) if size > 1 else ():
            process_group = dist.new_group(list(range(first, first + size)), backend="gloo")
            if first <= rank < first + size:
                self.process_group = process_group

    def _start(self, folder: str, trust_remote_code: bool) -> LLM:
        config = self.config
        if self.on_gpu:
            # What torch keeps for itself looks taken to vLLM.
            torch.cuda.empty_cache()
        # While it starts, vLLM has all of the process's objects gone through a dozen times, a third of a second each.
        gc.collect()
        gc.freeze()
        try:
            return LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                trust_remote_code=trust_remote_code,
                dtype=config.dtype,
                seed=config.seed + self.engine_number,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=config.tensor_model_parallel_size,
                disable_custom_all_reduce=True,
                enable_sleep_mode=config.free_cache_engine and self.on_gpu,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                max_model_len=self.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                enable_chunked_prefill=config.enable_chunked_prefill,
                gpu_memory_utilization=config.gpu_memory_utilization,
                kv_cache_dtype=config.kv_cache_dtype,
                enforce_eager=config.enforce_eager,
                compilation_config=self._compilation(),
                disable_log_stats=config.disable_log_stats,
                use_tqdm_on_load=False,
            )
        except (RuntimeError, ValueError) as error:
            if "memory" not in str(error).lower():
                raise
            raise RuntimeError(f"{error}\n{MEMORY_ADVICE}") from error

    def _compilation(self) -> dict[str, Any]:
        """By itself vLLM captures CUDA graphs of at most 512 sequences, and decodes larger batches kernel by kernel;
        and what it compiles for ranks that share an engine sums through FlashInfer, not NCCL."""
        settings: dict[str, Any] = {}
        if not self.on_gpu or self.config.enforce_eager:
            return settings
        if self.config.max_num_seqs > VLLM_LARGEST_GRAPH:
            settings["max_cudagraph_capture_size"] = self.config.max_num_seqs
        if self.config.tensor_model_parallel_size > 1:
            settings["pass_config"] = {"fuse_allreduce_rms": False}
        return settings

    # ------------------------------------------------------------ answers

    def _generate(
        self, prompts: DataProto, sampling: SamplingConfig, seed: int, reported: int, longest: int
    ) -> DataProto:
        """As `BaseRollout._generate`. RuntimeError before the first push, and after `sleep` until the next."""
        if not self._has_weights:
            raise RuntimeError(
                "the vLLM engine has no weights: call push_weights before the first generate, after a push that failed "
                "and, with actor_rollout_ref.rollout.free_cache_engine=True, after every sleep, which drops them"
            )
        self._wake("kv_cache")
        # Prefixes cached by an earlier call may be of other weights. And an engine that always starts cold schedules
        # equal prompts equally, so that the draws, which come from one generator for the whole batch, repeat.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests of an earlier call still hold blocks")
        own = RankPrompts(_token_ids(prompts), reported, seed)
        ranks_prompts = self._gather(own)
        requests, params = [], []
        for one in ranks_prompts:
            requests += [{"prompt_token_ids": ids} for ids in one.prompts]
            params += [
                self._params(sampling, len(ids), row < one.reported, longest) for row, ids in enumerate(one.prompts)
            ]
        with self._generators(ranks_prompts[0].seed):
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        start = sum(len(one.prompts) for one in ranks_prompts[: self.place])
        return self._to_batch(outputs[start : start + len(own.prompts)], sampling.n, own.reported)

    def _gather(self, own: RankPrompts) -> list[RankPrompts]:
        """The prompts of all ranks of this engine, in rank order."""
        if self.process_group is None:
            return [own]
        ranks_prompts: list[Any] = [None] * self.config.tensor_model_parallel_size
        dist.all_gather_object(ranks_prompts, own, group=self.process_group)
        return ranks_prompts

    def _params(self, sampling: SamplingConfig, prompt_length: int, report: bool, longest: int) -> SamplingParams:
        # No seed per request: a sampler that knows one draws row by row. `ignore_eos` is about the EOS that vLLM takes
        # from the folder it was given, which has no generation config; answers end at `eos_token_ids`.
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature if sampling.do_sample else 0.0,
            top_p=sampling.top_p if sampling.do_sample else 1.0,
            top_k=sampling.top_k if sampling.do_sample else -1,
            max_tokens=min(longest, self.max_model_len - prompt_length),
            ignore_eos=True,
            stop_token_ids=self.eos_token_ids,
            logprobs=0 if report else None,
            flat_logprobs=True,
            detokenize=False,
        )

    @contextmanager
    def _generators(self, seed: int) -> Iterator[None]:
        """The process's generators set to a seed, and as they were after.

        vLLM draws from them: its older model runner every token from torch's, the newer one a seed per request from
        NumPy's.
        """
        numpy_state = np.random.get_state()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.on_gpu else []):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)

    def _to_batch(self, outputs: list[RequestOutput], n: int, reported: int) -> DataProto:
        shape = (len(outputs), n, self.config.response_length)
        responses = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        log_probs = np.zeros(shape, dtype=np.float32)
        lengths = np.zeros(shape[:2], dtype=np.int64)
        for row, output in enumerate(outputs):
            for column, answer in enumerate(output.outputs):
                length = lengths[row, column] = len(answer.token_ids)
                responses[row, column, :length] = answer.token_ids
                if row < reported:
                    log_probs[row, column, :length] = answer.logprobs.logprobs
        mask = np.arange(shape[-1]) < lengths[..., None]
        return DataProto.from_dict(
            {
                "responses": torch.from_numpy(responses),
                "response_mask": torch.from_numpy(mask.astype(np.int64)),
                "rollout_log_probs": torch.from_numpy(log_probs),
                "rollout_log_probs_mask": (torch.arange(len(outputs)) < reported).long(),
            }
        )

    # ------------------------------------------------------------ weights and memory

    @torch.no_grad()
    def push_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """As `BaseRollout.push_weights`: each tensor is copied into the engine's own memory before the next comes."""
        self._wake("weights")
        self._has_weights = False
        check = PushCheck(tensor_shapes(self._structure))
        tensors = checkpoint_tensors(self._structure, check.through(weights))
        (left,) = self.llm.collective_rpc(self._load, args=(tensors,))
        check.verify()
        if left:
            raise RuntimeError(
                f"vLLM's {type(self._structure).__name__} cannot take pushed weights on this device: {len(left)} "
                f"parameters got none, e.g. {', '.join(left[:2])}; set actor_rollout_ref.rollout.name=hf"
            )
        self._has_weights = True

    def sleep(self) -> None:
        """With `free_cache_engine`, give up weights and KV cache; the next push and generation take them back."""
        if not self.config.free_cache_engine:
            return
        self._has_weights = False
        if self.on_gpu and self._asleep != SLEEPING_MEMORY:
            # vLLM 0.26 takes an engine that sleeps in part for one that sleeps.
            self._wake("kv_cache")
            self.llm.sleep(level=2)
            self._asleep = set(SLEEPING_MEMORY)

    def wake(self) -> None:
        """Take back the memory of the weights alone, for `push_weights`; the KV cache waits for `generate`."""
        self._wake("weights")

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            # The engine's memory comes from the driver, not from what torch keeps for itself.
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[part])
            self._asleep.discard(part)


def check_family(model: PreTrainedModel) -> None:
    """ValueError where vLLM has no code for the model's class and cannot run transformers' own either. By itself it may
    take the class of pictures and text that is named alike, as 0.26 does for Qwen3.5, and end in some other error."""
    name = type(model).__name__
    # Where it learns of classes that other packages bring.
    load_general_plugins()
    if name not in ModelRegistry.get_supported_archs() and not model.is_backend_compatible():
        raise ValueError(
            f"actor_rollout_ref.rollout.name=vllm: vLLM {__version__} has no {name}, and cannot run the class that "
            "transformers has: install a later vLLM, or set actor_rollout_ref.rollout.name=hf, which is slow"
        )


def load_class(name: str) -> None:
    """Load vLLM's class of that name, if there is one, and have it known by it. By itself vLLM first looks at it in a
    process of its own, which loads all libraries again (19 s on a host with a GPU), so that CUDA need not begin in this
    one, where it has begun; and keeps what it saw for later starts, where its cache folder is kept."""
    if name in ModelRegistry.models:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def list_cache_tensors(worker) -> None:
    """Have a model runner that clears its KV cache as it wakes, as that of vLLM 0.26 does and that of 0.32 does not,
    hold it tensor by tensor: layers that carry a state have several, of which it takes each layer's for one
    (vllm-project/vllm#49237)."""
    if not hasattr(worker.model_runner, "init_fp8_kv_scales"):
        return
    caches = worker.model_runner.kv_caches
    caches[:] = [tensor for cache in caches for tensor in (cache if isinstance(cache, list) else [cache])]


def _token_ids(prompts: DataProto) -> list[list[int]]:
    """Prompts without their left padding."""
    ids, mask = prompts.batch["input_ids"].cpu(), prompts.batch["attention_mask"].cpu()
    starts = (ids.shape[1] - mask.sum(-1)).tolist()
    return [row[start:] for row, start in zip(ids.tolist(), starts, strict=True)]


def _model_folder(config: PretrainedConfig, architecture: str, dtype: str) -> str:
    """A folder with all that vLLM reads of a model whose weights come later: its config, and code that came with it.

    It is named by what is in it and stays: vLLM finds what it has compiled for a model by the name of the folder.
    """
    code = Path(config.name_or_path).glob("*.py") if config.name_or_path else ()
    config = copy.deepcopy(config)
    config.architectures, config.dtype = [architecture], dtype
    with tempfile.TemporaryDirectory() as written:
        config.save_pretrained(written)
        files = {file.name: file.read_bytes() for file in (*Path(written).iterdir(), *code)}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    folder = Path(VLLM_CACHE_ROOT) / "verl_models" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        # Another engine may be reading it, or writing the same.
        part = folder / f"{name}.{secrets.token_hex(8)}"
        part.write_bytes(content)
        os.replace(part, folder / name)
    return str(folder)
