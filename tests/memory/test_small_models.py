"""Larger micro-batches for small models: where they fit and are worth it, and where not."""

import logging
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from verl.data_tools.lengths.advice import advise
from verl.data_tools.lengths.limits import Limits
from verl.data_tools.lengths.room import Machine
from verl.memory.check import check_run_memory, run_settings
from verl.memory.estimate import estimate_memory
from verl.memory.knobs import Knob
from verl.memory.small import larger_micro_batches
from verl.models.shape import ModelShape
from verl.trainer.config import compose_config
from verl.utils.units import GIB

ACTOR, CRITIC = "actor_rollout_ref.actor", "critic"
TOKENS = "ppo_max_token_len_per_gpu"
# SmolLM2-135M's sizes.
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SIZES |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
# What a compiled layer keeps of a token in bf16: two norms of 576, queries, keys, values, output, 9 log-sums, an MLP.
KEPT = 2 * 2 * 2 * 576 + 2 * (2 * 576 + 2 * 192) + 4 * 9 + 3 * 2 * 1536


def small(**changes) -> tuple[ModelShape, ModelShape]:
    return tuple(ModelShape.of(LlamaConfig(**SIZES | changes, num_labels=1), kind) for kind in ("policy", "score"))


def config_of(*overrides: str, model: str = "x"):
    needed = ["data.train_files=x", f"{ACTOR.removesuffix('.actor')}.model.path={model}", "trainer.experiment_name=x"]
    sizes = ["data.max_prompt_length=512", "data.max_response_length=512", "data.train_batch_size=64"]
    return compose_config([*needed, "trainer.device=cuda", *sizes, *overrides])


def found(*overrides: str, gib: float = 80, shapes=None) -> dict[str, tuple[int, int]]:
    knobs, _ = larger_micro_batches(run_settings(config_of(*overrides)), *(shapes or small()), gib * GIB)
    return {knob.key: (knob.now, knob.better) for knob in knobs}


def test_the_students_micro_batches_grow_and_take_what_is_worked_out_by_hand():
    run, shapes = run_settings(config_of()), small()
    knobs, larger = larger_micro_batches(run, *shapes, 80 * GIB)
    # The discriminator's are as large already.
    assert knobs == [Knob(f"{ACTOR}.{TOKENS}", 16384, 32768)]
    before, after = (estimate_memory(one, *shapes, 80 * GIB).need("update_actor") for one in (run, larger))
    assert after - before == 16384 * 30 * KEPT


def test_both_grow_where_both_are_small():
    both = {f"{ACTOR}.{TOKENS}": (16384, 32768), f"{CRITIC}.{TOKENS}": (8192, 32768)}
    assert found(f"{CRITIC}.{TOKENS}=8192") == both


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([f"{ACTOR}.{TOKENS}=32768"], {}),
        ([f"{ACTOR}.{TOKENS}=65536"], {}),
        # One prompt and its eight answers: 512 + 8 x 512 tokens.
        (["data.train_batch_size=1", f"{ACTOR}.ppo_mini_batch_size=1", f"{CRITIC}.ppo_mini_batch_size=1"], {}),
        (
            [
                f"{ACTOR}.use_dynamic_bsz=False",
                f"{ACTOR}.ppo_micro_batch_size_per_gpu=8",
                f"{CRITIC}.ppo_micro_batch_size_per_gpu=8",
            ],
            {},
        ),
        # 57 million in the embedding, 30 layers of 8.8 million.
        ([], {"hidden_size": 1152}),
    ],
    ids=["as large", "larger", "one micro-batch", "by rows", "another size"],
)
def test_they_stay_as_they_are(overrides, changes):
    assert found(*overrides, shapes=small(**changes)) == {}


def test_they_stay_where_a_fifth_of_the_card_would_not_be_left():
    _, larger = larger_micro_batches(run_settings(config_of()), *small(), 80 * GIB)
    need = estimate_memory(larger, *small(), 80 * GIB).need("update_actor") / GIB
    assert found(gib=need / 0.8 + 0.01) and not found(gib=need / 0.8 - 0.01)


def test_a_run_says_so_before_it_starts(tmp_path, caplog):
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "verl"):
        check_run_memory(config_of("stage=seqkd", model=str(tmp_path)), (80 * GIB, 128 * GIB))
        said = f"larger ones fit: {ACTOR}.{TOKENS}=32768 (now 16384)"
        assert said in caplog.text
        caplog.clear()
        check_run_memory(config_of("stage=seqkd", model=str(tmp_path)), (8 * GIB, 128 * GIB))
        assert "Memory: the run needs" in caplog.text and "larger ones fit" not in caplog.text


def test_a_large_model_in_4_bits_is_no_small_one():
    """Of 1.3 billion parameters all but the embedding's 98 million are packed; it is gathered whole for that."""
    (policy, _), sizes = small(), {"hidden_size": 2000, "intermediate_size": 6000, "num_attention_heads": 10}
    large = small(**sizes, num_key_value_heads=10)[0]
    packed = replace(large, frozen=large.parameters - 10**6, packed=large.layers * large.layer_parameters)
    assert large.parameters > 10**9 and large.parameters - packed.packed < 300_000_000
    run = run_settings(config_of("stage=seqkd"))
    assert not larger_micro_batches(run, packed, None, 140 * GIB)[0]
    assert larger_micro_batches(run, policy, None, 140 * GIB)[0]


def test_one_micro_batch_instead_of_two_may_take_less():
    """Nine rows of 1,890 tokens on each of eight ranks: as one they are 626 tokens more, 890 of 1,890 with logits, and
    no rank sums gradients of two micro-batches whole."""
    lengths = ["data.max_prompt_length=1000", "data.max_response_length=890", "data.train_batch_size=72"]
    run, (shape, _) = run_settings(config_of("stage=seqkd", "trainer.n_gpus_per_node=8", *lengths)), small()
    knobs, larger = larger_micro_batches(run, shape, None, 80 * GIB)
    assert knobs == [Knob(f"{ACTOR}.{TOKENS}", 16384, 32768)]
    before, after = (estimate_memory(one, shape, None, 80 * GIB).need("update_actor") for one in (run, larger))
    more = 626 * 30 * KEPT + 626 * 890 / 1890 * 49152 * 2
    assert before - after == pytest.approx(4 * shape.parameters * 7 / 8 - more)
    assert before > after


def test_settings_for_measured_lengths_have_them():
    machine = Machine(*small(), gpu_bytes=80 * GIB)
    advice = advise("gad", Limits(512, 512, 0.0, 0.0, 1.0), 10_000, 0.99, "x", 1, machine)
    assert advice.settings[f"{ACTOR}.{TOKENS}"] == 32768
    (reason,) = [why for key, why in advice.reasons if key == f"{ACTOR}.{TOKENS}"]
    assert "waits for the host" in reason
    config = compose_config(["data.train_files=x", "stage=gad", f"{ACTOR.removesuffix('.actor')}.model.path=x",
                             "trainer.experiment_name=x", "trainer.device=cuda", *advice.line.split()])  # fmt: skip
    estimate = estimate_memory(run_settings(config), machine.actor, machine.critic, machine.gpu_bytes)
    need = f"about {estimate.need(estimate.largest) / GIB:.1f} GiB of 80.0 GiB"
    assert advice.reasons[-1][1].startswith(need)


@pytest.mark.parametrize("stage", ["seqkd", "gad"])
@pytest.mark.parametrize("gib", [8, 10, 12, 16, 24, 32, 80])
def test_every_setting_is_advised_once_whatever_the_card(stage, gib):
    """Where memory is short, what saves it is not undone; and a micro-batch always holds a row."""
    machine = Machine(*small(), gpu_bytes=gib * GIB)
    advice = advise(stage, Limits(2048, 8192, 0.0, 0.0, 1.0), 10_000, 0.99, "x", 1, machine)
    keys = [key for key, _ in advice.reasons]
    assert len(keys) == len(set(keys))
    larger = [key for key, why in advice.reasons if "waits for the host" in why]
    assert not (larger and any("saves memory" in why for _, why in advice.reasons))
    if stage == "gad":
        assert advice.settings.get(f"{CRITIC}.{TOKENS}", 32768) >= 2048 + 8192


def test_long_rows_have_settings_for_a_small_card():
    """Halving the discriminator's micro-batches stops at a whole row of 20,480 tokens."""
    machine = Machine(*small(), gpu_bytes=32 * GIB)
    advice = advise("gad", Limits(8192, 12288, 0.0, 0.0, 1.0), 10_000, 0.99, "x", 1, machine)
    assert advice.settings.get(f"{CRITIC}.{TOKENS}", 32768) >= 20480
    assert "by the trainer's estimate" in advice.reasons[-1][1]
