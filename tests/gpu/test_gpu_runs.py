"""Whole stages through Ray on GPUs, the engine on the trained weights at every step."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.running import read_metrics, train
from tests.gpu.shapes import language_model
from tests.tiny import byte_tokenizer, write_data

STEPS = 3
# In every step the discriminator is trained, for its metrics to be there: the balance may leave one out.
GAD = ("stage=warmup", "trainer.critic_warmup=1", "critic.optim.lr=1e-4", "critic.balance.enable=False")
FP32 = "actor_rollout_ref.actor.fsdp_config.dtype=float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu_runs")
    language_model("qwen2").save_pretrained(path / "base")
    byte_tokenizer().save_pretrained(path / "base")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    return path


@pytest.fixture
def run(folder):
    """`run(name, ranks, *overrides)`: the metrics of a few steps, by step."""

    def start(name, ranks, *overrides):
        if torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs")
        settings = (
            "trainer.device=cuda",
            f"trainer.n_gpus_per_node={ranks}",
            f"trainer.total_training_steps={STEPS}",
            "trainer.test_freq=-1",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "actor_rollout_ref.rollout.gpu_memory_utilization=0.1",
            "actor_rollout_ref.rollout.enforce_eager=True",
            "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        )
        return read_metrics(train(folder, name, *settings, *overrides))

    return start


def gad(run, name, ranks, *overrides):
    metrics = run(name, ranks, *GAD, *overrides)
    gaps = [metrics[step]["training/rollout_probs_diff_mean"] for step in range(STEPS)]
    assert max(gaps) < 5e-3, gaps
    return metrics


def test_gad_on_one_gpu(run):
    """Validation before and after it as well, which wakes the engine on its own."""
    metrics = gad(run, "one", 1, "trainer.test_freq=2")
    assert [step for step, data in metrics.items() if "val/rouge-L/mean" in data] == [0, 2, STEPS]
    last = metrics[STEPS - 1]
    # 25 million parameters take 0.3 GB with their optimizer, and the discriminator as much.
    assert 0.5 < last["perf/max_memory_allocated_gb"] < 8
    assert 0 < last["perf/mfu/actor"] < 1 and 0 < last["perf/mfu/critic"] < 1


def test_gad_with_everything_offloaded(run):
    offload = [
        f"{part}.fsdp_config.{what}_offload=True"
        for part in ("actor_rollout_ref.actor", "critic.model", "actor_rollout_ref.ref")
        for what in ("param", "optimizer")
    ]
    plain, offloaded = gad(run, "plain", 1), gad(run, "offloaded", 1, *offload)
    for step in range(STEPS):
        for name in ("critic/d_loss", "critic/grad_norm", "response_length/mean"):
            assert offloaded[step][name] == pytest.approx(plain[step][name], rel=0.05, abs=1e-4), (step, name)
    memory = "perf/max_memory_allocated_gb"
    assert offloaded[STEPS - 1][memory] < plain[STEPS - 1][memory]


def test_gad_with_adapters_on_one_base(run):
    """As on two, in less memory; and with the base in host memory between uses."""
    lora = ("actor_rollout_ref.model.lora_rank=8", "critic.model.lora_rank=8")
    offload = ("actor_rollout_ref.actor.fsdp_config.param_offload=True", "critic.model.fsdp_config.param_offload=True")
    apart = gad(run, "apart", 1, *lora, "critic.model.share_base=False")
    shared = gad(run, "shared", 1, *lora, "critic.model.share_base=True")
    offloaded = gad(run, "shared offloaded", 1, *lora, *offload)
    for step in range(STEPS):
        for name in ("critic/d_loss", "critic/grad_norm", "response_length/mean"):
            for other in (shared, offloaded):
                assert other[step][name] == pytest.approx(apart[step][name], rel=0.05, abs=1e-4), (step, name)
    memory = "perf/max_memory_allocated_gb"
    assert shared[STEPS - 1][memory] < apart[STEPS - 1][memory]


def test_gad_beside_weights_in_4_bits(run):
    """One base, in less memory than in bf16; and with it in host memory between uses."""
    lora = ("actor_rollout_ref.model.lora_rank=8", "critic.model.lora_rank=8")
    packed = ("actor_rollout_ref.model.load_in_4bit=True", "critic.model.load_in_4bit=True")
    offload = ("actor_rollout_ref.actor.fsdp_config.param_offload=True", "critic.model.fsdp_config.param_offload=True")
    shared, four = gad(run, "in bf16", 1, *lora), gad(run, "in 4 bits", 1, *lora, *packed)
    offloaded = gad(run, "in 4 bits, offloaded", 1, *lora, *packed, *offload)
    for step in range(STEPS):
        for name in ("critic/d_loss", "critic/grad_norm", "response_length/mean"):
            assert offloaded[step][name] == pytest.approx(four[step][name], rel=0.05, abs=1e-4), (step, name)
    memory = "perf/max_memory_allocated_gb"
    assert four[STEPS - 1][memory] < shared[STEPS - 1][memory]


def test_resuming_with_everything_offloaded(run):
    """The weights, the optimizer's states and the engine after a restart, against a run in one piece."""
    offload = ("actor_rollout_ref.actor.fsdp_config.param_offload=True", "critic.model.fsdp_config.param_offload=True")
    offload += ("actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",)
    whole = gad(run, "whole", 1, *offload)
    run("parts", 1, *GAD, *offload, "trainer.total_training_steps=2")
    parts = gad(run, "parts", 1, *offload)
    for name in ("critic/d_loss", "critic/grad_norm", "response_length/mean"):
        assert parts[STEPS - 1][name] == pytest.approx(whole[STEPS - 1][name], rel=0.05, abs=1e-4), name


@pytest.mark.several_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_seqkd_losses_do_not_depend_on_the_number_of_gpus(run, ranks):
    seqkd = ("stage=seqkd", FP32, "trainer.sft_monitor_freq=-1", "trainer.val_before_train=False")
    seqkd += ("actor_rollout_ref.rollout.name=hf",)
    one, several = run(f"seqkd one of {ranks}", 1, *seqkd), run(f"seqkd {ranks}", ranks, *seqkd)
    for step in range(STEPS):
        for name in ("actor/sft_loss", "actor/grad_norm", "actor/entropy"):
            assert several[step][name] == pytest.approx(one[step][name], rel=1e-4), (step, name)


@pytest.mark.several_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_gad_on_several_gpus(run, ranks):
    gad(run, f"gad {ranks}", ranks)


@pytest.mark.several_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_tensor_parallel_engine(run, ranks):
    gad(run, f"tp {ranks}", ranks, "actor_rollout_ref.rollout.tensor_model_parallel_size=2")


@pytest.mark.several_gpus
def test_answers_a_step_ahead(run):
    """An engine on a GPU of its own has the weights that are trained next, which come over NCCL; what it has written is
    one update older, of which the first step has none. The last step pushes nothing."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    own = ("trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1", "algorithm.rollout_is=token")
    metrics = run("ahead", 1, *GAD, *own)
    assert [metrics[step]["training/rollout_staleness"] for step in range(STEPS)] == [0, 0, 1]
    gaps = [metrics[step]["training/rollout_probs_diff_mean"] for step in range(STEPS - 1)]
    assert max(gaps) < 5e-3, gaps
