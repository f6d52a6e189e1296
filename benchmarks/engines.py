"""A generation engine alone: on one rank, without a trainer around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.inputs import FIRST_TEXT_ID, base_overrides, compose
from benchmarks.shapes import Shape
from verl.models.loading import load_config
from verl.models.tokenizer import load_tokenizer
from verl.protocol import DataProto
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import Config
from verl.workers.rollout import BaseRollout, get_rollout_class
from verl.workers.worker_base import FSDPWorker


def engine_name(device: str) -> str:
    """vLLM on a GPU, Hugging Face generation on CPU."""
    return "vllm" if device == "cuda" else "hf"


def engine_settings(
    folder: Path,
    device: str,
    prompt_tokens: int,
    new_tokens: int,
    n: int,
    max_num_seqs: int,
    memory: float,
    more: Sequence[str] = (),
) -> Config:
    """A configuration in which the engine's part is what the benchmark asks for; `more` are further settings."""
    return compose(
        [
            "stage=seqkd",
            *base_overrides(folder, device),
            "data.train_files=none",
            f"data.max_prompt_length={prompt_tokens}",
            f"data.max_response_length={new_tokens}",
            f"actor_rollout_ref.rollout.name={engine_name(device)}",
            f"actor_rollout_ref.rollout.n={n}",
            f"actor_rollout_ref.rollout.max_num_seqs={max_num_seqs}",
            f"actor_rollout_ref.rollout.gpu_memory_utilization={memory}",
            "actor_rollout_ref.rollout.enforce_eager=False",
            *more,
        ]
    )


def start_engine(config: Config) -> BaseRollout:
    """The trainer's engine with the weights of the model folder in it."""
    # Joins a process group of one, as every worker does.
    worker = LocalWorkerGroup(ClassWithInitArgs(FSDPWorker, config.trainer.device, 1, "engine", 1)).worker
    path = Path(config.actor_rollout_ref.model.path)
    rollout = get_rollout_class(config.actor_rollout_ref.rollout.name)(
        load_config(path, "policy"), load_tokenizer(path), config.actor_rollout_ref.rollout, worker.device
    )
    rollout.push_weights(stored_weights(path, worker.device))
    return rollout


def stored_weights(policy: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's weight file, one at a time."""
    with safe_open(policy / "model.safetensors", framework="pt", device=device) as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            yield name, file.get_tensor(name)


def random_prompts(shape: Shape, count: int, tokens: int, seed: int = 0) -> DataProto:
    """Prompts of equal length."""
    ids = torch.randint(FIRST_TEXT_ID, shape.vocab, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return DataProto.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
