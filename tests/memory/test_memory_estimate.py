"""The memory estimate against sums made by hand, against what autograd really keeps, and against measured peaks."""

import logging
from dataclasses import replace

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import (
    Gemma2Config,
    GPT2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import FAMILIES, SIZES, answer_rows, causal_lm, scorer
from verl.memory.estimate import GIB, RunSettings, check_memory, estimate_memory, host_memory, layer_bytes_per_token
from verl.memory.knobs import knobs
from verl.models.adapters import add_adapters
from verl.models.answer_models import PolicyModel
from verl.models.packing import AnswerRows
from verl.models.shape import ModelShape
from verl.trainer.config import compose_config

ACTOR, CRITIC, ROLLOUT = "actor_rollout_ref.actor", "critic", "actor_rollout_ref.rollout"
# Prompts and answers of 512 + 512, and a batch that 2 ranks can share.
SMALL = ["data.max_prompt_length=512", "data.max_response_length=512", "data.train_batch_size=64"]
# Qwen2.5-1.5B. A layer: q and o 1536 x 1536, k and v 1536 x 256, biases on q, k, v; three of 1536 x 8960; two norms.
LAYER = 2 * 1536 * 1536 + 2 * 1536 * 256 + (1536 + 256 + 256) + 3 * 1536 * 8960 + 2 * 1536
EMBEDDING = 151936 * 1536
PARAMETERS = EMBEDDING + 28 * LAYER + 1536


def qwen(**changes) -> PretrainedConfig:
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    return Qwen2Config(**sizes | changes)


@pytest.fixture(scope="module")
def actor() -> ModelShape:
    return ModelShape.of(qwen(), "policy")


@pytest.fixture(scope="module")
def critic() -> ModelShape:
    return ModelShape.of(qwen(num_labels=1), "score")


def run_of(*overrides: str) -> RunSettings:
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    config = compose_config([*required, "trainer.device=cuda", *SMALL, *overrides])
    return RunSettings(
        config.actor_rollout_ref,
        config.critic if config.use_critic else None,
        config.use_reference,
        config.trainer.ranks,
        config.trainer.n_gpus_per_node,
        pairs=config.soda.enable,
        async_save=config.trainer.async_save,
    )


# --- sizes of models ---


def test_parameters_are_counted_as_by_hand(actor, critic):
    assert LAYER == 46_797_824 and PARAMETERS == 1_543_714_304
    assert (actor.parameters, actor.layer_parameters, actor.layers) == (PARAMETERS, LAYER, 28)
    assert (actor.width, actor.intermediate, actor.heads, actor.kv_heads) == (1536, 8960, 12, 2)
    assert (actor.head_dim, actor.vocabulary, actor.normed_heads) == (128, 151936, False)
    # The score head has one weight per hidden unit and a bias.
    assert critic.parameters == PARAMETERS + 1536 + 1


def test_an_untied_head_is_a_matrix_of_its_own():
    assert ModelShape.of(qwen(tie_word_embeddings=False), "policy").parameters == PARAMETERS + EMBEDDING


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_built_model(family):
    model = causal_lm(family)
    shape = ModelShape.of(model.config, "policy")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer_parameters == sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert shape.head_dim == 8 and shape.layers == SIZES["num_hidden_layers"]
    assert shape.normed_heads == (family == "qwen3")


def test_parameters_of_a_built_discriminator():
    model = scorer()
    assert ModelShape.of(model.config, "score").parameters == sum(p.numel() for p in model.parameters())


def test_what_other_families_leave_unsaid_is_filled_in():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    shape = ModelShape.of(config, "policy")
    assert (shape.kv_heads, shape.intermediate, shape.head_dim, shape.layers) == (4, 128, 8, 2)


# --- activations ---


def test_activations_of_a_layer_are_those_added_by_hand(actor):
    # Norms 2 x 8 x 1536, attention 2 x (2 x 1536 + 2 x 256) + 4 x 12, MLP 4 x 2 x 8960.
    assert layer_bytes_per_token(actor, "bfloat16", compiled=False) == 24_576 + 7_216 + 71_680
    # Norms 2 x 4 x 1536, MLP 3 x 2 x 8960.
    assert layer_bytes_per_token(actor, "bfloat16", compiled=True) == 12_288 + 7_216 + 53_760
    # Norms 2 x 12 x 1536, attention 4 x (2 x 1536 + 2 x 256) + 4 x 12, MLP 4 x 4 x 8960.
    assert layer_bytes_per_token(actor, "float32", compiled=False) == 36_864 + 14_384 + 143_360


@pytest.mark.parametrize(
    ("config_class", "model_class", "extra"),
    [(Qwen2Config, Qwen2ForCausalLM, {}), (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16})],
)
def test_activations_of_a_layer_are_what_autograd_keeps(config_class, model_class, extra):
    def kept(layers: int) -> int:
        config = config_class(**sizes, num_hidden_layers=layers, **extra)
        module = PolicyModel(model_class(config).to(torch.bfloat16))
        weights = {p.untyped_storage()._cdata for p in module.parameters()}
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.answers(rows, before=True)
        return sum(storage.nbytes() for storage in storages.values())

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    rows: AnswerRows = answer_rows([100] * 4, [28] * 4)
    shape = ModelShape.of(config_class(**sizes, num_hidden_layers=1, **extra), "policy")
    per_token = (kept(2) - kept(1)) / (4 * 128)
    # On a CPU, attention runs on a padded grid: keys and values are repeated to as many heads as queries, 64 numbers of
    # 2 bytes each where 32 would do, and the output is there as a grid and as packed tokens.
    on_grid = 2 * (2 * 32 + 64)
    # And each norm keeps a number per token (or head), which is nothing beside a real hidden size.
    per_norm = 4 * (2 + (4 + 2 if shape.normed_heads else 0))
    assert per_token == pytest.approx(layer_bytes_per_token(shape, "bfloat16", compiled=False) + on_grid + per_norm)


def test_activations_move_the_peak_as_measured(actor):
    # Peaks of an update of Qwen2.5-1.5B with 16,384 tokens on an H200, in GiB: 92.3 with full logits and 79.4 with the
    # layers compiled; 60.3 with logits in chunks and 15.3 with all layers computed again.
    def activations(*overrides):
        budget = f"{ACTOR}.ppo_max_token_len_per_gpu=16384"
        parts = estimate_memory(run_of(budget, *overrides), actor, None, 140 * GIB).phases["update_actor"]
        return parts["activations of 16384 tokens"] / GIB

    plain = activations(f"{ACTOR}.fsdp_config.use_torch_compile=False")
    compiled = activations(f"{ACTOR}.fsdp_config.use_torch_compile=True")
    recomputed = activations(
        f"{ACTOR}.fsdp_config.use_torch_compile=False", "actor_rollout_ref.model.enable_gradient_checkpointing=True"
    )
    assert plain - compiled == pytest.approx(92.3 - 79.4, rel=0.05)
    assert plain - recomputed == pytest.approx(60.3 - 15.3, rel=0.1)


def test_recomputed_layers_keep_their_input_and_one_is_whole_at_a_time(actor):
    def bytes_per_token(share):
        model = "actor_rollout_ref.model"
        flags = (f"{model}.enable_gradient_checkpointing=True", f"{model}.recompute_share={share}")
        parts = estimate_memory(run_of(*flags), actor, None, 140 * GIB).phases["update_actor"]
        return parts["activations of 16384 tokens"] / 16384

    layer = 73_264
    assert bytes_per_token(1.0) == layer + 28 * 2 * 1536
    assert bytes_per_token(0.5) == 14 * layer + layer + 14 * 2 * 1536
    assert bytes_per_token(0.0) == 28 * layer


# --- phases ---


def test_two_ranks_by_hand(actor, critic):
    # 64 prompts on 2 ranks: 32 prompts and 32 x 8 answers of at most 512 tokens are 147,456 tokens, so micro-batches
    # are full, and there are several.
    estimate = estimate_memory(run_of("trainer.n_gpus_per_node=2"), actor, critic, 80 * GIB)
    weights, critic_weights = 2 * PARAMETERS, 2 * (PARAMETERS + 1537)  # 4 bytes over 2 ranks
    resting = {
        "actor's weights": weights,
        "actor's optimizer states": 2 * weights,
        "critic's weights": critic_weights,
        "critic's optimizer states": 2 * critic_weights,
        "reference's weights": PARAMETERS,  # 2 bytes over 2 ranks
        "CUDA and its libraries": 2 * GIB,
    }
    assert estimate.phases["generate"] == {**resting, "vLLM": 40 * GIB}
    outside = EMBEDDING + 1536
    assert estimate.phases["update_actor"] == {
        **resting,
        "actor's gradients": 4 * PARAMETERS,
        "gathered layers": 2 * (2 * LAYER + outside) + 2 * outside + 6 * LAYER,
        "activations of 16384 tokens": 16384 * 28 * 73_264,
        "logits": GIB,  # of the 4.1 GiB of 8/9 of the tokens
    }
    outside += 1537
    assert estimate.phases["update_critic"] == {
        **resting,
        "critic's gradients": 4 * (PARAMETERS + 1537),
        "gathered layers": 2 * (2 * LAYER + outside) + 2 * outside + 6 * LAYER,
        "activations of 32768 tokens": 32768 * 28 * 73_264,
    }
    assert estimate.host == {"reading a model": 4 * (PARAMETERS + 1537)}
    assert estimate.largest == "update_critic"


def test_gradients_that_are_reduced_at_every_micro_batch_stay_sharded(actor, critic):
    flags = [f"{ACTOR}.fsdp_config.sync_gradients_once=False", "trainer.n_gpus_per_node=2"]
    phases = estimate_memory(run_of(*flags), actor, critic, 80 * GIB).phases
    assert phases["update_actor"]["actor's gradients"] == 2 * PARAMETERS
    assert phases["update_critic"]["critic's gradients"] == 4 * (PARAMETERS + 1537)


def test_a_single_micro_batch_shares_its_gradients_out_at_once(actor):
    # 8 prompts on 2 ranks are 4 teacher answers of at most 1,024 tokens each.
    seqkd = ["stage=seqkd", "trainer.n_gpus_per_node=2", f"{ACTOR}.ppo_mini_batch_size=8", "data.train_batch_size=8"]
    parts = estimate_memory(run_of(*seqkd), actor, None, 80 * GIB).phases["update_actor"]
    assert parts["actor's gradients"] == 2 * PARAMETERS
    assert parts["activations of 4096 tokens"] == 4096 * 28 * 73_264
    assert parts["logits"] == 2048 * 151936 * 2
    assert not [name for name in parts if "critic" in name or "reference" in name]


def test_capped_scores_are_those_of_one_row_three_times():
    """Gemma 2 2B: 8 heads, and rows of 512 + 512 tokens; three times 8 x 1024 x 1024 numbers of four bytes are 96 MiB.
    Without its cap, and padded, where they are Hugging Face's own, there is no such part."""
    gemma = {"num_attention_heads": 8, "num_hidden_layers": 2}
    capped, plain = (ModelShape.of(Gemma2Config(**gemma, attn_logit_softcapping=cap), "policy") for cap in (50.0, None))
    packed, padded = run_of("stage=seqkd"), run_of("stage=seqkd", "actor_rollout_ref.model.use_remove_padding=False")
    name = "capped scores of one row"
    assert estimate_memory(packed, capped, None, 80 * GIB).phases["update_actor"][name] == 96 * 2**20
    assert name not in estimate_memory(packed, plain, None, 80 * GIB).phases["update_actor"]
    assert name not in estimate_memory(padded, capped, None, 80 * GIB).phases["update_actor"]


def test_micro_batches_by_rows_and_whole_groups(actor, critic):
    rows = [f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"]
    rows += ["critic.ppo_micro_batch_size_per_gpu=4"]
    estimate = estimate_memory(run_of(*rows), actor, critic, 80 * GIB)
    # Four answers and their prompt, of 512 tokens each.
    assert "activations of 2560 tokens" in estimate.phases["update_actor"]
    # Of six answers to a prompt the first four and then two, with the first two of the next.
    of_six = estimate_memory(run_of(*rows, "actor_rollout_ref.rollout.n=6"), actor, critic, 80 * GIB)
    assert "activations of 3072 tokens" in of_six.phases["update_actor"]
    # Padded rows have a prompt each.
    padded = [*rows, "actor_rollout_ref.model.use_remove_padding=False", "critic.model.use_remove_padding=False"]
    padded = estimate_memory(run_of(*padded), actor, critic, 80 * GIB)
    assert "activations of 4096 tokens" in padded.phases["update_actor"]
    assert "activations of 9216 tokens" in padded.phases["update_critic"]
    # A group of a prompt, a teacher's and 8 student answers is never split.
    assert "activations of 5120 tokens" in estimate.phases["update_critic"]
    budget = estimate_memory(run_of("critic.ppo_max_token_len_per_gpu=2048"), actor, critic, 80 * GIB)
    assert "activations of 5120 tokens" in budget.phases["update_critic"]


def test_ranks_that_share_a_row_hold_a_part_of_it_each(actor, critic):
    """Rows of 32,768 tokens, which a budget of 16,384 on each of two ranks holds; one on each rank takes them whole."""
    rows = [
        "stage=seqkd",
        "data.max_prompt_length=16384",
        "data.max_response_length=16384",
        "trainer.n_gpus_per_node=2",
    ]
    alone = estimate_memory(
        run_of(*rows, f"{ACTOR}.ppo_max_token_len_per_gpu=32768", "data.train_batch_size=4"), actor, None, 0
    )
    shared = estimate_memory(
        run_of(*rows, f"{ACTOR}.ulysses_sequence_parallel_size=2", "data.train_batch_size=4"), actor, None, 0
    )
    whole, half = alone.phases["update_actor"], shared.phases["update_actor"]
    assert half["activations of 16384 tokens"] * 2 == whole["activations of 32768 tokens"]
    assert half["actor's weights"] == whole["actor's weights"]
    # With few prompts a group's micro-batch is all of its rows, half of what its ranks would have alone: of 4 prompts
    # two each, of 1,024 tokens, and all four together.
    few = [f"{ACTOR}.ulysses_sequence_parallel_size=2", "critic.ulysses_sequence_parallel_size=2"]
    small = estimate_memory(
        run_of("stage=gad", *few, "trainer.n_gpus_per_node=2", f"{ROLLOUT}.n=2", "data.train_batch_size=4"),
        actor,
        critic,
        0,
    )
    # Four prompts with two answers each, and with a teacher's.
    assert "activations of 3072 tokens" in small.phases["update_actor"]
    assert "activations of 4096 tokens" in small.phases["update_critic"]


def test_pairs_of_answers_are_whole_and_keep_a_reference_for_new_ones_only(actor):
    rows = ["stage=soda", f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"]
    parts = estimate_memory(run_of(*rows), actor, None, 80 * GIB).phases["update_actor"]
    # Two pairs of a prompt and two answers, of 512 tokens each.
    assert "activations of 3072 tokens" in parts and "reference's weights" not in parts
    fewer = estimate_memory(run_of(*rows, f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"), actor, None, 80 * GIB)
    assert "activations of 1536 tokens" in fewer.phases["update_actor"]
    anew = estimate_memory(run_of(*rows, "soda.resample=epoch"), actor, None, 80 * GIB).phases["update_actor"]
    assert anew["reference's weights"] == 2 * PARAMETERS


def test_without_resharding_all_layers_are_gathered(actor):
    parts = estimate_memory(run_of(f"{ACTOR}.fsdp_config.reshard_after_forward=False"), actor, None, 80 * GIB).phases[
        "update_actor"
    ]
    assert parts["gathered layers"] == 2 * PARAMETERS + 2 * (EMBEDDING + 1536) + 6 * LAYER


def test_a_model_of_few_parameters_is_gathered_at_once(actor):
    key = f"{ACTOR}.fsdp_config.wrap_policy.min_num_params"
    at_once = estimate_memory(run_of(f"{key}={PARAMETERS + 1}"), actor, None, 80 * GIB).phases["update_actor"]
    # Weights and gradients in two bytes, and the layers' gradients once more in four.
    assert at_once["gathered layers"] == 2 * PARAMETERS + 2 * PARAMETERS + 4 * 28 * LAYER
    by_layers = [estimate_memory(run_of(f"{key}={few}"), actor, None, 80 * GIB) for few in (0, PARAMETERS)]
    layer_by_layer = 2 * (EMBEDDING + 1536 + 2 * LAYER) + 2 * (EMBEDDING + 1536) + 6 * LAYER
    assert [one.phases["update_actor"]["gathered layers"] for one in by_layers] == [layer_by_layer] * 2


def test_offloading_moves_parts_to_the_host_while_others_work(actor, critic):
    flags = [f"{ACTOR}.fsdp_config.param_offload=True", f"{ACTOR}.fsdp_config.optimizer_offload=True"]
    flags += ["critic.model.fsdp_config.optimizer_offload=True", "actor_rollout_ref.ref.fsdp_config.param_offload=True"]
    # 4 ranks on 2 machines, 2 each.
    machines = ["trainer.nnodes=2", "trainer.n_gpus_per_node=2"]
    estimate = estimate_memory(run_of(*machines, *flags), actor, critic, 80 * GIB)
    assert set(estimate.phases["generate"]) == {"critic's weights", "vLLM", "CUDA and its libraries"}
    assert estimate.phases["update_actor"]["actor's weights"] == PARAMETERS
    assert estimate.phases["update_actor"]["actor's optimizer states"] == 2 * PARAMETERS
    assert "critic's optimizer states" not in estimate.phases["update_actor"]
    assert estimate.phases["update_critic"]["critic's optimizer states"] == 2 * (PARAMETERS + 1537)
    assert "actor's weights" not in estimate.phases["update_critic"]
    assert estimate.host == {
        "actor's weights": 2 * PARAMETERS,
        "actor's optimizer states": 4 * PARAMETERS,
        "critic's optimizer states": 4 * (PARAMETERS + 1537),
        "reference's weights": PARAMETERS,
        "reading a model": 4 * (PARAMETERS + 1537),
    }


def test_background_writing_keeps_a_copy_of_what_a_machines_ranks_hold(actor, critic):
    machines = ["trainer.nnodes=2", "trainer.n_gpus_per_node=2", "trainer.async_save=True"]
    estimate = estimate_memory(run_of(*machines), actor, critic, 80 * GIB)
    assert estimate.host == {
        # 12 bytes a parameter on two machines.
        "copy of the actor for checkpoints": 6 * PARAMETERS,
        "copy of the critic for checkpoints": 6 * (PARAMETERS + 1537),
        "reading a model": 4 * (PARAMETERS + 1537),
    }


def test_an_engine_that_does_not_sleep_stays(actor, critic):
    awake = estimate_memory(run_of(f"{ROLLOUT}.free_cache_engine=False"), actor, critic, 80 * GIB)
    assert all(parts["vLLM"] == 40 * GIB for parts in awake.phases.values())
    hugging_face = estimate_memory(run_of(f"{ROLLOUT}.name=hf"), actor, critic, 80 * GIB)
    for parts in hugging_face.phases.values():
        assert parts["rollout's weights"] == 2 * PARAMETERS
        # Keys and values of 2 heads of 128 in 28 layers, 2 bytes each, for 1,024 answers of 1,024 tokens.
        assert parts["KV cache"] == 2 * 28 * 2 * 128 * 2 * 1024 * 1024


# --- what is said ---


def test_the_sentence_names_phase_parts_and_limits(actor, critic):
    run = run_of(f"{ROLLOUT}.gpu_memory_utilization=0.4")
    sentence = estimate_memory(run, actor, critic, 140 * GIB).sentence(140 * GIB, 128 * GIB)
    # On one rank: actor and critic 12 bytes per parameter each, reference 2, the critic's gradients 4, which are
    # 43.13 GiB; 1.31 gathered, 62.60 of activations, 2 of libraries.
    assert sentence == (
        "needs about 109.0 GiB of 140.0 GiB on each GPU while the critic is updated; biggest parts: activations of "
        "32768 tokens 62.6, critic's optimizer states 11.5, actor's optimizer states 11.5, critic's weights 5.8, "
        "critic's gradients 5.8; 5.8 of 128.0 GiB of each machine's host memory"
    )


def test_what_fits_is_logged_and_not_warned_of(actor, critic, caplog):
    with caplog.at_level(logging.INFO, "verl"):
        check_memory(run_of(), actor, critic, 140 * GIB, 128 * GIB)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    # 26 bytes per parameter are 37.38 GiB, beside half of the card and 2 GiB.
    assert "needs about 109.4 GiB of 140.0 GiB on each GPU while answers are generated" in caplog.text


def test_what_does_not_fit_is_warned_of_with_what_would_help_most_first(actor, critic, caplog):
    run = run_of()
    check_memory(run, actor, critic, 80 * GIB, 128 * GIB)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("About 109.0 GiB are needed on each GPU while the critic is updated, and it has 80.0 GiB")
    # Checkpointing keeps 28 inputs of 1536 and one layer in full: (27 x 73,264 - 28 x 3,072) x 32,768 bytes.
    assert "critic.model.enable_gradient_checkpointing=True (now False) saves 57.7 GiB" in warning
    assert "critic.ppo_max_token_len_per_gpu=16384 (now 32768) saves 31.3 GiB" in warning
    assert "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True (now False) saves 11.5 GiB" in warning
    assert "actor_rollout_ref.actor.fsdp_config.param_offload=True (now False) saves 5.8 GiB" in warning
    assert "twice as many GPUs (now 1)" in warning
    # What the update itself needs cannot rest, and vLLM sleeps.
    assert "critic.model.fsdp_config" not in warning and "gpu_memory_utilization" not in warning
    saved = [float(part.split()[0]) for part in warning.split(" saves ")[1:]]
    assert saved == sorted(saved, reverse=True) and len(saved) >= 6


def test_what_is_advised_saves_what_is_said(actor, critic):
    run = run_of()
    settings = replace(run.critic, ppo_max_token_len_per_gpu=16384)
    needs = [estimate_memory(r, actor, critic, 0).need("update_critic") for r in (run, replace(run, critic=settings))]
    assert (needs[0] - needs[1]) / GIB == pytest.approx(31.3, abs=0.05)


def test_too_much_beside_vllm_is_warned_of_with_its_share(actor, critic, caplog):
    check_memory(run_of(f"{ROLLOUT}.gpu_memory_utilization=0.9"), actor, critic, 140 * GIB, 128 * GIB)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "while answers are generated" in warning
    assert "actor_rollout_ref.rollout.gpu_memory_utilization=0.8 (now 0.9) saves 14.0 GiB" in warning
    assert "critic.model.fsdp_config.optimizer_offload=True (now False) saves 11.5 GiB" in warning


def test_weights_and_states_that_cannot_fit_are_refused(actor, critic):
    # 12 + 12 + 2 bytes per parameter: 37.4 GiB.
    with pytest.raises(ValueError, match=r"need 37\.4 GiB on each GPU while .* has 24\.0 GiB: .*_offload=True"):
        check_memory(run_of(), actor, critic, 24 * GIB, 128 * GIB)


def test_a_container_that_is_given_less_than_the_machine_has_is_the_limit(tmp_path):
    version_2, version_1 = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    total = psutil.virtual_memory().total
    assert host_memory((version_2, version_1)) == total
    version_2.write_text("max\n")
    assert host_memory((version_2, version_1)) == total
    version_2.write_text("1000000000\n")
    assert host_memory((version_2, version_1)) == 10**9
    # How version 1 says that there is no limit.
    version_1.write_text("9223372036854771712\n")
    assert host_memory((version_1,)) == total


def test_a_host_that_is_too_small_is_warned_of(actor, critic, caplog):
    check_memory(run_of(f"{ACTOR}.fsdp_config.optimizer_offload=True"), actor, critic, 140 * GIB, 16 * GIB)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "17.3 GiB of host memory" in warning and "actor's optimizer states 11.5" in warning and "16.0 GiB" in warning


# --- the list of settings ---


def keys_of(phase: str, *overrides: str) -> set[str]:
    run = run_of(*overrides)
    return {knob.key for knob in knobs(phase, run.actor_rollout_ref, run.critic)}


OFFLOADS = {
    "actor": {f"{ACTOR}.fsdp_config.param_offload", f"{ACTOR}.fsdp_config.optimizer_offload"},
    "critic": {"critic.model.fsdp_config.param_offload", "critic.model.fsdp_config.optimizer_offload"},
    "reference": {"actor_rollout_ref.ref.fsdp_config.param_offload"},
}


def test_each_phase_has_its_own_settings():
    gpu = f"{ROLLOUT}.gpu_memory_utilization"
    everything = set().union(*OFFLOADS.values())
    assert keys_of("generate") == keys_of("init") == {gpu} | everything
    assert keys_of("push_weights") == {gpu} | everything - {f"{ACTOR}.fsdp_config.param_offload"}
    assert keys_of("update_actor") == OFFLOADS["critic"] | OFFLOADS["reference"] | {
        f"{ACTOR}.ppo_max_token_len_per_gpu",
        "actor_rollout_ref.model.enable_gradient_checkpointing",
        f"{ACTOR}.fsdp_config.sync_gradients_once",
    }
    assert keys_of("update_critic") == OFFLOADS["actor"] | OFFLOADS["reference"] | {
        "critic.ppo_max_token_len_per_gpu",
        "critic.model.enable_gradient_checkpointing",
        "critic.model.fsdp_config.sync_gradients_once",
    }
    log_prob = f"{ROLLOUT}.log_prob_max_token_len_per_gpu"
    assert keys_of("compute_log_prob") == {log_prob} | everything - {f"{ACTOR}.fsdp_config.param_offload"}
    assert keys_of("compute_ref_log_prob") == {log_prob} | OFFLOADS["actor"] | OFFLOADS["critic"]
    assert keys_of("compute_scores") == {"critic.ppo_max_token_len_per_gpu"} | everything - {
        "critic.model.fsdp_config.param_offload"
    }


def test_settings_that_are_turned_already_are_not_named():
    flags = [f"{ACTOR}.fsdp_config.param_offload=True", f"{ACTOR}.fsdp_config.optimizer_offload=True"]
    flags += ["actor_rollout_ref.ref.fsdp_config.param_offload=True", "critic.model.fsdp_config.optimizer_offload=True"]
    flags += ["critic.model.fsdp_config.sync_gradients_once=False"]
    flags += ["critic.model.enable_gradient_checkpointing=True", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=1024"]
    assert keys_of("update_critic", *flags) == {"critic.ppo_max_token_len_per_gpu"}
    assert keys_of("compute_log_prob", *flags) == {"critic.model.fsdp_config.param_offload"}


def test_settings_of_other_layouts():
    rows = [f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"]
    rows += ["critic.ppo_micro_batch_size_per_gpu=18", f"{ACTOR}.fsdp_config.reshard_after_forward=False"]
    rows += ["actor_rollout_ref.model.enable_gradient_checkpointing=True"]
    rows += ["actor_rollout_ref.model.recompute_share=0.5", f"{ROLLOUT}.free_cache_engine=False"]
    run = run_of(*rows)
    found = {knob.key: (knob.now, knob.better) for knob in knobs("update_actor", run.actor_rollout_ref, None)}
    assert found == {
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": (4, 2),
        "actor_rollout_ref.model.recompute_share": (0.5, 1.0),
        f"{ACTOR}.fsdp_config.sync_gradients_once": (True, False),
        f"{ACTOR}.fsdp_config.reshard_after_forward": (False, True),
        f"{ROLLOUT}.free_cache_engine": (False, True),
        "actor_rollout_ref.ref.fsdp_config.param_offload": (False, True),
    }
    assert f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu" in keys_of("compute_log_prob", *rows)
    assert f"{ROLLOUT}.max_num_seqs" in keys_of("generate", f"{ROLLOUT}.name=hf")


def test_a_token_budget_is_not_lowered_below_a_sequence():
    run = run_of(f"{ACTOR}.ppo_max_token_len_per_gpu=1500")
    (budget,) = [k for k in knobs("update_actor", run.actor_rollout_ref, None) if "max_token_len" in k.key]
    assert (budget.now, budget.better) == (1500, 1024)


# --- adapters ---


def adapted(kind: str, rank: int = 8, in_4bit: bool = False) -> ModelShape:
    config = qwen(num_labels=1) if kind == "score" else qwen()
    return ModelShape.of(config, kind, adapters=LoraConfig(r=rank, target_modules="all-linear"), in_4bit=in_4bit)


# Rank 8 times the inputs and outputs of q, k, v, o, gate, up and down, in 28 layers.
OFFLOADED = [f"{part}.fsdp_config.param_offload=True" for part in (ACTOR, "critic.model")]
ADAPTERS = 28 * 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))


def test_adapters_are_counted_as_by_hand():
    assert ADAPTERS == 9_232_384
    policy, score = adapted("policy"), adapted("score")
    assert (policy.trained, policy.frozen) == (ADAPTERS, PARAMETERS)
    # The score head, a weight per hidden unit and a bias, is trained whole.
    assert (score.trained, score.frozen) == (ADAPTERS + 1537, PARAMETERS)


def test_memory_of_adapters_is_as_worked_out_by_hand():
    """Frozen weights in bf16, adapters in fp32 with moments and gradients; no second model as the reference."""
    run = run_of("stage=gad", "trainer.async_save=True")
    assert run.use_reference and run.ranks == 1
    parts = estimate_memory(run, adapted("policy"), adapted("score"), 80 * GIB)
    update, host = parts.phases["update_actor"], parts.host
    assert update["actor's weights"] == 2 * PARAMETERS + 4 * ADAPTERS
    assert update["actor's optimizer states"] == 8 * ADAPTERS and update["actor's gradients"] == 4 * ADAPTERS
    assert update["critic's weights"] == 2 * PARAMETERS + 4 * (ADAPTERS + 1537)
    assert "reference's weights" not in update
    assert host["copy of the actor for checkpoints"] == 12 * ADAPTERS
    # Two gathered layers with what is around them, in bf16, and the gradients of one layer's adapters, in both types.
    layer = LAYER + ADAPTERS // 28
    assert update["gathered layers"] == 2 * (2 * layer + PARAMETERS - 28 * LAYER) + 6 * ADAPTERS / 28


def test_memory_of_weights_in_4_bits_is_as_worked_out_by_hand():
    """4 bits a number and an fp32 number for each 64, of the seven matrices of each layer; biases, norms, head and
    embedding stay in bf16. They are not gathered; those of one layer are there in bf16 as it computes."""
    matrices = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960
    policy = adapted("policy", in_4bit=True)
    assert policy.packed == 28 * matrices == 1_310_195_712
    assert (policy.trained, policy.frozen) == (ADAPTERS, PARAMETERS)
    run = run_of("stage=gad")
    update = estimate_memory(run, policy, adapted("score", in_4bit=True), 80 * GIB).phases["update_actor"]
    weights = 2 * (PARAMETERS - policy.packed) + policy.packed / 2 + 4 * policy.packed / 64
    assert update["actor's weights"] == weights + 4 * ADAPTERS
    assert update["critic's weights"] == weights + 4 * (ADAPTERS + 1537)
    layer = 2 * (LAYER + ADAPTERS // 28)
    around = 2 * (PARAMETERS - 28 * LAYER)
    # What is not in 4 bits is 243M parameters: few enough to be gathered at once; by layers, two of them are there.
    by_layers = run_of("stage=gad", f"{ACTOR}.fsdp_config.wrap_policy.min_num_params=0")
    two_layers = estimate_memory(by_layers, policy, None, 80 * GIB).phases["update_actor"]
    assert 242e6 < PARAMETERS + ADAPTERS - policy.packed < 244e6
    assert update["gathered layers"] == around + 28 * (layer - 2 * matrices) + 2 * matrices + 6 * ADAPTERS
    assert two_layers["gathered layers"] == around + 2 * (layer - 2 * matrices) + 2 * matrices + 6 * ADAPTERS / 28
    # They are on each of several GPUs, whole.
    two = estimate_memory(replace(run, ranks=2), policy, None, 80 * GIB).phases["update_actor"]
    packed = policy.packed / 2 + 4 * policy.packed / 64
    assert two["actor's weights"] == (weights - packed + 4 * ADAPTERS) / 2 + packed


def test_memory_of_a_shared_base_is_as_worked_out_by_hand():
    """The critic's own weights are its adapters and head; while it is updated, the actor's base is there too."""
    own, away = run_of("stage=gad"), run_of("stage=gad", f"{ACTOR}.fsdp_config.param_offload=True")
    shapes = adapted("policy"), adapted("score")
    sizes = [estimate_memory(replace(run, share_base=True), *shapes, 80 * GIB) for run in (own, away)]
    for estimate in sizes:
        update = estimate.phases["update_critic"]
        assert update["critic's weights"] == 4 * (ADAPTERS + 1537)
        assert update["actor's weights"] == 2 * PARAMETERS + 4 * ADAPTERS
    assert "actor's weights" not in sizes[1].phases["generate"]
    assert sizes[1].host["actor's weights"] == 2 * PARAMETERS + 4 * ADAPTERS
    for phase in sizes[0].phases:
        saved = estimate_memory(own, *shapes, 80 * GIB).need(phase) - sizes[0].need(phase)
        assert saved == 2 * PARAMETERS
    # With both at rest in host memory, the base is there once.
    both = replace(run_of("stage=gad", *OFFLOADED), share_base=True)
    assert estimate_memory(both, *shapes, 80 * GIB).host["critic's weights"] == 4 * (ADAPTERS + 1537)


def test_activations_with_adapters_are_what_autograd_keeps():
    """What frozen layers no longer keep for their own gradients, their adapters do; those of the norms, a tenth of all
    in so narrow a model, nobody does."""

    def kept(rank: int) -> int:
        config = Qwen2Config(**sizes)
        hf = Qwen2ForCausalLM(config).to(torch.bfloat16)
        if rank:
            add_adapters(hf, LoraConfig(r=rank, target_modules="all-linear"))
            hf.to(torch.bfloat16)
        module = PolicyModel(hf)
        weights, storages = {p.untyped_storage()._cdata for p in module.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.answers(rows, before=True)
        return sum(storage.nbytes() for storage in storages.values())

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
    rows = answer_rows([100] * 4, [28] * 4)
    # Seven matrices in two layers keep two numbers of bf16 for each of 512 tokens.
    ranks = 2 * 7 * 2 * 2 * 512
    assert kept(0) * 0.85 < kept(2) - ranks < kept(0)
