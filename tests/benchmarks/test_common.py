"""The benchmarks' arithmetic by hand, their inputs, and each script's shortest run on CPU."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.ahead import learned
from benchmarks.classic import ClassicPolicyModel, as_pairs
from benchmarks.common import format_table
from benchmarks.engines import random_prompts
from benchmarks.inputs import (
    EOS,
    MIXED,
    TINY,
    batch_of_tokens,
    in_memory,
    random_batch,
    repeated_prompts,
    rows_of,
    write_critic,
    write_policy,
)
from benchmarks.long import compared
from benchmarks.shapes import (
    SHAPES,
    Shape,
    attention_flops,
    decode_limit_seconds,
    push_limit_seconds,
    training_flops,
    training_flops_done,
)
from benchmarks.start import OTHER, SAVED_BYTES, THIS, median_row, row_of, summed_up
from benchmarks.step import even_share, random_texts, summarize
from tests.tiny import answer_rows, causal_lm
from verl.models.answer_models import PolicyModel
from verl.models.finding import is_discriminator
from verl.models.loading import load_model
from verl.models.shape import Limits
from verl.models.tokenizer import load_tokenizer
from verl.utils.profiling import busy_seconds, kind_of

ROOT = Path(__file__).parents[2]
# Two heads of 2, one of them for keys and values. A layer has (4 + 1) * (4 + 2 + 2) + 4 * 4 parameters in attention,
# 3 * 4 * 3 in the MLP and 2 * 4 in norms, 100; with the last norm the body has 204, and the embedding 40.
HAND = Shape("hand", hidden=4, layers=2, heads=2, kv_heads=1, intermediate=3, vocab=10, tied=True)


# ---- arithmetic


def test_parameters_by_hand():
    assert HAND.body_parameters == 204
    assert HAND.parameters == 244
    assert HAND.kv_bytes_per_token == 2 * 2 * 2 * 2  # keys and values, layers, one head of 2, bytes


@pytest.mark.parametrize(
    ("name", "published"),
    # SmolLM2-135M has 134,515,008, and biases of queries, keys and values in 30 layers are 30 (576 + 2 * 192).
    [
        ("135m", 134_515_008 + 28_800),
        ("0.5b", 494_032_768),
        ("1.5b", 1_543_714_304),
        ("3b", 3_085_938_688),
        ("7b", 7_615_616_512),
    ],
)
def test_parameters_are_those_published(name, published):
    assert SHAPES[name].parameters == published


def test_training_flops_by_hand():
    lengths = [3, 5]
    # 2 L^2 is 18 and 50; times 2 heads of 2 in each of 2 layers.
    assert attention_flops(HAND, lengths) == (18 + 50) * 4 * 2 == 544
    assert training_flops(HAND, lengths) == 6 * 244 * 8 + 3 * 544 == 13344
    # A prompt of 2 tokens that both begin with is computed once: 2 tokens and 2 x 2^2 less.
    assert attention_flops(HAND, lengths, [2]) == (18 + 50 - 8) * 4 * 2 == 480
    assert training_flops(HAND, lengths, [2]) == 6 * 244 * 6 + 3 * 480
    assert training_flops_done(HAND, lengths, 5, 10, [2]) == 6 * (204 * 6 + 4 * 10 * 5) + 3 * 480
    # The head of 10 outputs on 5 of the 8 tokens.
    assert training_flops_done(HAND, lengths, head_tokens=5, head_width=10) == 6 * (204 * 8 + 4 * 10 * 5) + 3 * 544
    assert training_flops_done(HAND, lengths, head_tokens=8, head_width=10) == training_flops(HAND, lengths)


def test_decode_limit_by_hand():
    limits = Limits(flops=1000.0, bandwidth=100.0)
    # Weights are 488 bytes, a token's keys and values 16. Two steps attend to 3 + 5 + 2 = 10 and to 12 tokens.
    assert decode_limit_seconds(HAND, limits, [3, 5], new_tokens=2, at_once=2) == pytest.approx(
        (488 + 160) / 100 + (488 + 192) / 100
    )
    one_by_one = [(488 + 16 * attended) / 100 for attended in (4, 5, 6, 7)]
    assert decode_limit_seconds(HAND, limits, [3, 5], new_tokens=2, at_once=1) == pytest.approx(sum(one_by_one))
    # 2 * 244 operations a sequence and 4 * 2 * 2 * 2 a token attended to.
    slow = Limits(flops=10.0, bandwidth=1e9)
    assert decode_limit_seconds(HAND, slow, [3], new_tokens=1, at_once=1) == pytest.approx((488 + 4 * 32) / 10)


def test_decode_limit_at_known_sizes():
    """About 148,000 tokens/s for 1,024 sequences of a thousand tokens, and 116,000 for 256."""
    limits = Limits(989e12, 4.8e12)
    for at_once, expected in ((1024, 148_000), (256, 116_000)):
        seconds = decode_limit_seconds(SHAPES["1.5b"], limits, [1000] * at_once, new_tokens=1, at_once=at_once)
        assert at_once / seconds == pytest.approx(expected, rel=0.05)


def test_push_limit():
    assert push_limit_seconds(SHAPES["1.5b"], Limits(989e12, 4.8e12)) == pytest.approx(1.3e-3, rel=0.02)


# ---- reports


def test_table_is_aligned():
    rows = [
        {"name": "a", "count": 1200, "share": 0.12345},
        {"name": "long", "count": 7, "share": None, "unseen": 1},
    ]
    assert format_table(rows, ("name", "count", "share", "nowhere")).splitlines() == [
        "name  count  share",
        "----  -----  -----",
        "a     1,200  0.123",
        "long      7      -",
    ]


def test_busy_time_counts_overlaps_once():
    assert busy_seconds([(1.0, 3.0), (0.0, 2.0), (5.0, 6.0), (5.2, 5.4)]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<cutlass::bfloat16_t>", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies, casts"),
        ("triton_poi_fused__to_copy_cat_mul_neg_3", "elementwise, norm"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("void at::native::reduce_kernel<MeanOps>", "elementwise, norm"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


def test_summary_of_steps():
    steps = [
        {"timing_s/step": s, "timing_s/gen": 1.0, "timing_s/adv": 0.5, "perf/throughput": 10} for s in (9, 4, 2, 6)
    ]
    row = summarize(steps, warmup=1)
    assert (row["step"], row["gen"], row["rest"], row["overhead"]) == (4, 1.0, 2.5, 0.75)
    assert row["values"] is None
    assert row["warmup_seconds"] == [9]


# ---- inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_policy(SHAPES["tiny"], path / "policy", "cpu")
    write_critic(path / "policy", path / "critic")
    return path


def test_the_policy_never_ends_an_answer(models):
    model = load_model(models / "policy", "policy")
    ids = random_prompts(SHAPES["tiny"], 4, 32).batch["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)
    assert log_probs[..., EOS].max() < -40
    assert log_probs[..., EOS + 1 :].std() > 0.05  # and the rest is still a choice


def test_the_critic_is_the_policy_with_a_fresh_head(models):
    assert is_discriminator(models / "critic")
    critic, policy = load_model(models / "critic", "score"), load_model(models / "policy", "policy")
    assert torch.equal(critic.model.norm.weight, policy.model.norm.weight)


def test_every_token_of_the_vocabulary_is_text(models):
    tokenizer = load_tokenizer(models / "policy")
    assert len(tokenizer) == SHAPES["tiny"].vocab
    assert tokenizer.decode([500]).startswith(" w")
    prompt, teacher = random_texts(1, TINY)[0].values()
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert len(ids) == len(prompt[0]["content"]) + 2
    assert len(tokenizer(teacher)["input_ids"]) == len(teacher)


@pytest.mark.parametrize(("loss", "repeats"), [("sft", 0), ("gspo", 2), ("ranking", 3)])
def test_all_but_one_of_the_rows_of_a_prompt_repeat_it(loss, repeats):
    """Three students, and for the discriminator a teacher beside them."""
    batch = random_batch(SHAPES["tiny"], prompts=2, answers=3, lengths=TINY)
    prompts = batch.batch["attention_mask"].sum(-1).tolist()
    repeated = repeated_prompts(rows_of(loss, batch), batch)
    assert sorted(repeated) == sorted(prompts * repeats)


@pytest.mark.parametrize("loss", ["sft", "gspo", "gspo+anchor", "ranking"])
def test_batches_fill_their_tokens(loss):
    batch = batch_of_tokens(SHAPES["1.5b"], loss, answers=8, lengths=MIXED, tokens=65536)
    tokens = sum(rows_of(loss, batch).lengths())
    assert 0.85 * 65536 < tokens <= 65536


def test_the_rule_of_grpo():
    assert even_share([2, 3, 4, 6]) == 0.75


# ---- the classic way


def test_classic_log_probs_are_the_same():
    rows = answer_rows([3, 5, 1], [4, 2, 6])
    with torch.no_grad():
        ours = PolicyModel(causal_lm())(rows, 0.7, "value")
        classic = ClassicPolicyModel(causal_lm(), remove_padding=False)(rows, 0.7, "value")
    for one, other in zip(ours, classic, strict=True):
        torch.testing.assert_close(one, other)


def test_pairs_have_a_teacher_each():
    batch = random_batch(SHAPES["tiny"], prompts=2, answers=3, lengths=TINY)
    pairs = as_pairs(batch)
    assert pairs.batch["responses"].shape == (6, 1, TINY.answer[1])
    assert torch.equal(pairs.batch["responses"][4, 0], batch.batch["responses"][1, 1])
    assert torch.equal(pairs.batch["teacher_response"][4], batch.batch["teacher_response"][1])


# ---- whole runs


def run(script: str, out: Path, *options: str) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--shape", "tiny", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["benchmark"] == script
    assert torch.__version__.startswith(written["versions"]["torch"])
    return written["results"]


@pytest.mark.e2e
def test_update_runs(tmp_path):
    rows = run("update", tmp_path / "out.json", "--warmup", "1", "--steps", "1")
    assert [(row["loss"], row["way"]) for row in rows] == [
        (loss, way) for way in ("ours", "classic") for loss in ("sft", "gspo", "gspo+anchor", "ranking")
    ]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] is None for row in rows)
    assert all(row["times_classic"] > 0 for row in rows if row["way"] == "ours")


def test_long_rows_are_compared_with_the_first_size_and_the_first_length():
    rows = [
        {"sp": sp, "length": length, "us_per_token": cost, "peak_gib": peak}
        for sp, length, cost, peak in ((1, 2, 4.0, 10.0), (1, 8, 6.0, 40.0), (2, 2, 5.0, 8.0), (2, 8, 6.6, 22.0))
    ]
    assert compared(rows[3], rows) == pytest.approx({"of_alone": 1.1, "of_shortest": 1.32, "peak_of_alone": 0.55})
    assert compared(rows[0], rows[:1]) == {"of_alone": 1, "of_shortest": 1, "peak_of_alone": 1}


@pytest.mark.e2e
def test_long_runs(tmp_path):
    options = ["--lengths", "32", "65", "--step-tokens", "256", "--tokens", "128", "--warmup", "1", "--steps", "1"]
    rows = run("long", tmp_path / "out.json", *options)
    assert [(row["sp"], row["length"], row["rows"]) for row in rows] == [(1, 32, 8), (1, 65, 2), (2, 32, 8), (2, 65, 2)]
    assert all(row["us_per_token"] > 0 and row["of_alone"] > 0 and row["peak_gib"] is None for row in rows)


@pytest.mark.e2e
def test_saving_runs(tmp_path):
    rows = run("saving", tmp_path / "out.json", "--steps", "1", "--folder", str(tmp_path))
    assert [row["way"] for row in rows] == ["foreground", "background"]
    assert all(0 < row["held"] <= row["written"] and row["resume"] > 0 for row in rows)
    assert rows[0]["gib"] == pytest.approx(rows[1]["gib"], rel=1e-4)  # times are among the files, as text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"], "no checkpoint is left"


@pytest.mark.e2e
def test_host_memory_runs(tmp_path):
    rows = run("host_memory", tmp_path / "out.json", "--gib", "0.01", "--times", "1")
    assert [row["way"] for row in rows] == ["plain", "ours"]
    assert all(row["take"] > 0 and row["copy"] > 0 for row in rows) and rows[0]["of_plain"] == 1


@pytest.mark.e2e
def test_packing_runs(tmp_path):
    rows = run("packing", tmp_path / "out.json", "--tokens", "16384", "--times", "3", "--against", str(ROOT))
    assert [(row["tree"], len(row["all_seconds"])) for row in rows] == [("other", 3), ("this", 3)]
    # Whole prompts, each with its eight answers.
    assert 8192 < rows[0]["tokens"] == rows[1]["tokens"] <= 16384 and rows[0]["rows"] % 8 == 0
    assert rows[1]["of_other"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


def test_gains_of_answers_a_step_ahead_are_compared_with_those_in_turn():
    in_turn = learned([0.3, 0.4], 0.25, None)
    assert (in_turn["exact"], in_turn["gain"]) == pytest.approx((0.35, 0.1))
    assert in_turn["gain_std"] == pytest.approx(0.1 / 2**0.5) and "error" not in in_turn
    ahead = learned([0.35, 0.35], 0.25, in_turn["gains"])
    # Variances of .005 and 0, two runs each.
    assert ahead["gain_less_turn"] == pytest.approx(0, abs=1e-12) and ahead["error"] == pytest.approx(0.0025**0.5)
    assert learned([0.35], 0.25, [0.05])["gain_less_turn"] == pytest.approx(0.05)


@pytest.mark.e2e
def test_dataset_runs(tmp_path):
    first, then = run("dataset", tmp_path / "out.json", "--rows", "1200", "--kind", "parquet")
    assert (first["start"], then["start"]) == ("first", "next")
    assert first["cache_gb"] == then["cache_gb"] > 0
    assert min(first["seconds"], then["seconds"], first["own_mib"]) > 0


@pytest.mark.e2e
@pytest.mark.parametrize("algorithm", ["gad", "grpo"])
def test_step_runs(tmp_path, algorithm):
    sizes = ["--prompts", "4", "--n", "4", "--tokens", "512", "--warmup", "1", "--steps", "1"]
    ours, classic = run("step", tmp_path / "out.json", "--algorithm", algorithm, *sizes)
    assert ours["response_length"] == 8  # EOS is never written
    assert ours["sync_gap"] < 1e-5
    assert ours["times_classic"] == pytest.approx(classic["step"] / ours["step"])
    assert ours["update_actor"] > 0
    # The classic way has passes of its own, and comes to the same.
    if algorithm == "gad":
        assert ours["values"] is None
        assert classic["values"] > 0
    assert ours["first_step"] == pytest.approx(classic["first_step"], rel=1e-3, abs=1e-6)


@pytest.mark.e2e
def test_adapters_run(tmp_path):
    sizes = ["--prompts", "4", "--n", "4", "--tokens", "512", "--steps", "1", "--rank", "2"]
    ways = ("shared", "apart", "4bit", "full")
    shared, apart, packed, full = run("adapters", tmp_path / "out.json", *sizes, "--ways", *ways)
    assert [row["one_base"] for row in (shared, apart, packed, full)] == [True, False, True, False]
    # Of each layer q and o are 128 x 128, k and v 128 x 64, three 128 x 256: rank 2 times inputs and outputs; two
    # models, and a head of 128 and a bias.
    adapters = 2 * 2 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert shared["trained_millions"] * 1e6 == pytest.approx(2 * adapters + 129)
    assert full["trained_millions"] * 1e6 == pytest.approx(2 * SHAPES["tiny"].parameters + 129)
    assert packed["trained_millions"] == shared["trained_millions"]
    assert shared["first_step"] == apart["first_step"] != packed["first_step"]
    for row in (shared, apart, packed, full):
        assert min(row["update_actor"], row["update_critic"], row["ref"]) > 0 and row["push_weights"] > 1e-4
        assert row["sync_gap"] < 1e-5


@pytest.mark.e2e
def test_engine_benchmarks_run(tmp_path):
    sizes = ["--prompts", "2", "--n", "2", "--prompt-tokens", "8", "--new-tokens", "8", "--steps", "1"]
    rows = run("rollout", tmp_path / "rollout.json", *sizes)
    assert [(row["way"], row["reported"], row["tokens"]) for row in rows] == [
        ("ours", 2, 32),
        ("ours", 0, 32),
        ("classic", 2, 32),
    ]
    (row,) = run("push", tmp_path / "push.json", "--steps", "1")
    assert (row["changed"], row["restored"]) == (1, 1)


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is installed here")
def test_peers_says_what_is_missing():
    command = [sys.executable, "-m", "benchmarks.peers", "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "pip install trl" in done.stderr


def test_a_starts_phases_become_columns_by_hand():
    seconds = {
        "total": 30.0,
        "driver": {"reading settings": 1.0, "loading libraries for models and data": 8.0, "starting Ray": 2.0,
                   "starting 2 ranks": 5.0,
                   "building models: the student's": 6.0, "building models: the discriminator's": 4.0, "rest": 4.0},
        "rank 0": {"comparing the student with its plain forward": 1.0, "building the hf engine": 0.5},
    }  # fmt: skip
    row = row_of(seconds)
    assert {name: value for name, value in row.items() if value is not None} == {
        "seconds": 30.0, "settings": 1.0, "libraries": 8.0, "ray": 2.0, "ranks": 5.0, "models": 10.0, "engine": 0.5,
        "proof": 1.0, "rest": 4.0,
    }  # fmt: skip
    assert median_row([{"seconds": s} for s in (5.0, 2.0, 4.0, 3.0)]) == {"seconds": 3.0}


def test_starts_are_compared_with_the_cold_one_and_with_the_other_trees():
    seconds = {OTHER: (60.0, 50.0, 20.0, 40.0), THIS: (30.0, 10.0, 15.0, 12.0)}
    rows = {name: [{"seconds": one} for one in starts] for name, starts in seconds.items()}
    assert summed_up({name: starts[:1] for name, starts in rows.items()}, THIS, slice(0, None)) == {
        "seconds": 30.0, "of_other": 0.5,
    }  # fmt: skip
    assert summed_up(rows, THIS, slice(1, None)) == {"seconds": 12.0, "of_cold": 0.4, "of_other": 0.3}
    assert summed_up(rows, OTHER, slice(1, None)) == {"seconds": 40.0, "of_cold": pytest.approx(2 / 3)}
    assert summed_up({THIS: rows[THIS]}, THIS, slice(3, None)) == {"seconds": 12.0, "of_cold": 0.4}


def test_what_has_room_is_in_memory(tmp_path, monkeypatch):
    """A checkpoint of 12 bytes a parameter for each of student and discriminator: 12 for each byte of a bf16 folder."""
    assert SAVED_BYTES == 12
    monkeypatch.setattr("benchmarks.inputs.MEMORY_FOLDER", tmp_path)
    free = shutil.disk_usage(tmp_path).free
    assert in_memory(free // 4) == tmp_path and in_memory(2 * free) is None
    monkeypatch.setattr("benchmarks.inputs.MEMORY_FOLDER", tmp_path / "missing")
    assert in_memory(0) is None


@pytest.mark.e2e
@pytest.mark.distributed
def test_start_runs(tmp_path):
    sizes = ("--prompts", "4", "--n", "2", "--tokens", "16", "16", "--rows", "16")
    cold, warm = run("start", tmp_path / "out.json", "--runs", "seqkd", "--warm", "1", *sizes)
    assert (cold["run"], cold["caches"], warm["caches"]) == ("seqkd", "cold", "warm 1")
    for row in (cold, warm):
        assert row["engine"] is None and row["validation"] is None and row["first_step"] > 0
        parts = ("settings", "libraries", "checks", "data", "ray", "ranks", "models", "first_step", "rest")
        assert sum(row[name] for name in parts) == pytest.approx(row["seconds"], abs=0.01)
    assert warm["of_cold"] == pytest.approx(warm["seconds"] / cold["seconds"])
