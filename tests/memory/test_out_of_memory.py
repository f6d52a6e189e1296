"""An out-of-memory error carries the settings that would help; other errors pass as they are."""

import pickle

import pytest
import torch

from verl.memory.errors import explain_out_of_memory
from verl.trainer.config import compose_config

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ORIGINAL = "CUDA out of memory. Tried to allocate 20.00 GiB."


def config_of(*overrides: str):
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    return compose_config([*required, "trainer.device=cuda", *overrides])


def explained(phase: str, settings, error: Exception) -> torch.OutOfMemoryError:
    with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(phase, settings):
        raise error
    return caught.value


def test_it_names_the_settings_of_the_phase_with_their_values_and_keeps_the_text():
    group = config_of(f"{ACTOR}.ppo_max_token_len_per_gpu=20000").actor_rollout_ref
    original = torch.OutOfMemoryError(ORIGINAL)
    error = explained("update_actor", group, original)
    assert type(error) is torch.OutOfMemoryError and error.__cause__ is original
    message = str(error)
    assert message.startswith(
        "The GPU's memory is full in update_actor: set actor_rollout_ref.actor.ppo_max_token_len_per_gpu=10000 "
        "(now 20000), or set actor_rollout_ref.model.enable_gradient_checkpointing=True (now False), or "
    )
    assert "critic.model.fsdp_config: param_offload, optimizer_offload" in message and "more GPUs" in message
    assert message.endswith(ORIGINAL)


def test_the_critics_settings():
    message = str(explained("update_critic", config_of().critic, torch.OutOfMemoryError(ORIGINAL)))
    assert "in update_critic: set critic.ppo_max_token_len_per_gpu=16384 (now 32768)" in message
    assert "critic.model.enable_gradient_checkpointing=True" in message
    assert "actor_rollout_ref.{actor,ref}.fsdp_config" in message


@pytest.mark.parametrize(
    ("phase", "key"),
    [
        ("init", f"{ROLLOUT}.gpu_memory_utilization=0.4 (now 0.5)"),
        ("generate", f"{ROLLOUT}.gpu_memory_utilization=0.4 (now 0.5)"),
        ("push_weights", f"{ACTOR}.fsdp_config.optimizer_offload=True (now False)"),
        ("compute_log_prob", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=8192 (now 16384)"),
        ("compute_ref_log_prob", f"{ACTOR}.fsdp_config.param_offload=True (now False)"),
    ],
)
def test_other_phases_of_the_actors_worker(phase, key):
    message = str(explained(phase, config_of().actor_rollout_ref, torch.OutOfMemoryError(ORIGINAL)))
    assert f"in {phase}: " in message and key in message


def test_an_engine_that_allocates_by_itself_is_understood_too():
    original = RuntimeError("CUDA Error: out of memory at /workspace/cumem_allocator.cpp:62")
    error = explained("generate", config_of().actor_rollout_ref, original)
    assert error.__cause__ is original and "cumem_allocator" in str(error)


def test_the_innermost_phase_explains():
    group = config_of().actor_rollout_ref
    inner, outer = explain_out_of_memory("push_weights", group), explain_out_of_memory("init", group)
    with pytest.raises(torch.OutOfMemoryError) as caught, outer, inner:
        raise torch.OutOfMemoryError(ORIGINAL)
    assert "push_weights" in str(caught.value) and "in init" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("NCCL error"), ValueError("out of memory of a kind"), KeyError("x")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, explain_out_of_memory("generate", config_of().actor_rollout_ref):
        raise error
    assert caught.value is error and error.__cause__ is None


@pytest.mark.parametrize(
    "error",
    [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")],
)
def test_the_machines_memory(error, monkeypatch):
    """Offloading fills it; on a run without a GPU all work is done in it."""
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(MemoryError) as caught, explain_out_of_memory("update_actor", config_of().actor_rollout_ref):
            raise error
        message = str(caught.value)
        assert message.startswith("The machine's memory is full in update_actor: ") and message.endswith(str(error))
        assert "use fewer processes on this machine (trainer.n_gpus_per_node)" in message
        assert (f"set {ACTOR}.ppo_max_token_len_per_gpu=8192 (now 16384)" in message) is not gpu
        assert ("offload" in message) is gpu


def test_without_an_error_nothing_happens():
    with explain_out_of_memory("generate", config_of().actor_rollout_ref):
        pass


def test_what_is_allocated_is_said(monkeypatch):
    numbers = {"memory_reserved": 61, "memory_allocated": 50, "max_memory_allocated": 60}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value * 2**30)
    message = str(explained("generate", config_of().actor_rollout_ref, torch.OutOfMemoryError(ORIGINAL)))
    held = "Of 80.0 GiB PyTorch has reserved 61.0 and uses 50.0 (at most 60.0 so far; "
    assert f"{held}what an engine gave up in its sleep counts), 3.0 are free" in message


def test_the_error_survives_the_way_to_the_driver():
    error = explained("generate", config_of().actor_rollout_ref, torch.OutOfMemoryError(ORIGINAL))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is torch.OutOfMemoryError and str(again) == str(error)
