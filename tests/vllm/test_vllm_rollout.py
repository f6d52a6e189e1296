"""Generation with vLLM: what comes out is what the pushed weights say, row by row, and nothing else can come out."""

import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.adapters import adapted
from tests.recent_families import recent
from tests.tiny import byte_tokenizer
from tests.vllm.tiny_engine import (
    EOS,
    GREEDY,
    LIMIT,
    PROMPT,
    TEMPERATURE,
    greedy_answers,
    prompts,
    real_tokens,
    running_engine,
    sampled,
    tiny_model,
)
from verl.batch import student_rows
from verl.models.answer_models import PolicyModel
from verl.models.sharding import full_parameters
from verl.workers.rollout import get_rollout_class

pytestmark = pytest.mark.vllm

LENGTHS = [3, 150, 1, 9, 200, 2]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def model(tied):
    return tiny_model(tied=tied)


@pytest.fixture
def engine(alone, tied, model):
    """An engine with the model's weights."""
    running = running_engine(tied)
    running.push_weights(model.named_parameters())
    return running


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_greedy_answers_equal_token_by_token_argmax(engine, model, pad_is_eos, monkeypatch):
    tokenizer = byte_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    data = prompts(LENGTHS)
    answered = engine.generate(data, GREEDY, seed=0)
    expected = greedy_answers(model, data)
    assert real_tokens(answered) == expected
    lengths = [len(answer) for answer in expected]
    assert min(lengths) < LIMIT == max(lengths), "rows must end at EOS and at the limit for this to prove anything"
    assert answered.batch["responses"].shape == answered.batch["response_mask"].shape == (len(LENGTHS), 1, LIMIT)
    assert answered.batch["response_mask"].flatten(0, 1).tolist() == [[1] * n + [0] * (LIMIT - n) for n in lengths]
    padding = answered.batch["responses"][answered.batch["response_mask"] == 0]
    assert padding.eq(tokenizer.pad_token_id).all()
    assert answered.batch["rollout_log_probs"].eq(0).all() and answered.batch["rollout_log_probs_mask"].eq(0).all()


def test_an_answer_ends_at_any_eos(engine, model, monkeypatch):
    data = prompts(LENGTHS)
    whole = greedy_answers(model, data)
    other = max(whole, key=len)[2]
    monkeypatch.setattr(engine, "eos_token_ids", [EOS, other])
    expected = [answer[: answer.index(other) + 1] if other in answer else answer for answer in whole]
    assert expected != whole
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) == expected


def test_answers_follow_the_weights_pushed_last(engine, tied):
    data, other = prompts(LENGTHS), tiny_model(seed=1, tied=tied)
    before = real_tokens(engine.generate(data, GREEDY, seed=0))
    engine.push_weights(other.named_parameters())
    after = real_tokens(engine.generate(data, GREEDY, seed=0))
    assert after == greedy_answers(other, data) != before


def test_prefixes_cached_under_old_weights_are_not_used(engine, model, tied, monkeypatch):
    data, other = prompts([PROMPT, 150]), tiny_model(seed=1, tied=tied)
    engine.generate(data, GREEDY, seed=0)
    request = {"prompt_token_ids": data.batch["input_ids"][0].tolist()}
    again = engine.llm.generate(request, engine._params(GREEDY, PROMPT, False, LIMIT), use_tqdm=False)
    assert again[0].num_cached_tokens >= 128, "the cache must be filled for this to prove anything"
    engine.push_weights(other.named_parameters())
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) == greedy_answers(other, data)

    # Without the reset the answers are of neither model.
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
    engine.push_weights(model.named_parameters())
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) != greedy_answers(model, data)


def test_a_cache_that_cannot_be_reset_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        engine.generate(prompts([3]), GREEDY, seed=0)


def test_reported_log_probs_are_the_policys_at_the_sampling_temperature(engine, model):
    data = prompts(LENGTHS)
    answered = engine.generate(data, sampled(4), seed=1, report_log_probs=2)
    assert answered.batch["rollout_log_probs_mask"].tolist() == [1, 1, 0, 0, 0, 0]
    data.union(answered)
    expected, _ = PolicyModel(model)(student_rows(data), temperature=TEMPERATURE)
    reported = answered.batch["rollout_log_probs"]
    torch.testing.assert_close(reported[:2].flatten(0, 1), expected[:8], atol=1e-3, rtol=0)
    assert reported[2:].eq(0).all()
    everything = engine.generate(prompts(LENGTHS), sampled(4), seed=1, report_log_probs=100)
    assert everything.batch["rollout_log_probs_mask"].tolist() == [1] * 6
    assert torch.equal(everything.batch["responses"], answered.batch["responses"])


def test_draws_are_a_function_of_the_seed(engine):
    data, states = prompts(LENGTHS), (torch.get_rng_state(), np.random.get_state()[1])
    first, again, other = (engine.generate(data, sampled(4), seed=seed).batch["responses"] for seed in (1, 1, 2))
    assert first.shape == (6, 4, LIMIT)
    assert torch.equal(first, again), "the second call must not profit from what the first has cached"
    assert not torch.equal(first, other)
    for answers in first:
        assert len({tuple(answer) for answer in answers.tolist()}) > 1
    # The trainer's own draws go on as if nothing had happened.
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


def test_sampling_follows_the_models_distribution(engine, model):
    """2,000 first tokens against the softmax at the temperature: 3.5 standard deviations for the top token."""
    data = prompts([200])
    probabilities = (model(data.batch["input_ids"]).logits[0, -1] / TEMPERATURE).softmax(-1)
    drawn = engine.generate(data, sampled(2000), seed=3).batch["responses"][0, :, 0]
    top = probabilities.argmax()
    p = probabilities[top].item()
    assert (drawn == top).float().mean().item() == pytest.approx(p, abs=3.5 * (p * (1 - p) / 2000) ** 0.5)


def renamed(weights):
    return [("model.unheard_of", weights[0][1]), *weights[1:]]


def reshaped(weights):
    return [(weights[0][0], weights[0][1][:-1]), *weights[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[1:], "1 weights were not pushed"),
        (lambda weights: [*weights, weights[0]], "came twice"),
        (renamed, "'model.unheard_of' is not a parameter"),
        (reshaped, "has shape"),
    ],
    ids=["missing", "twice", "unknown", "shape"],
)
def test_a_push_must_be_exactly_the_models_parameters(engine, model, change, message):
    weights = list(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        engine.push_weights(iter(change(weights)))
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate(prompts([3]), GREEDY, seed=0)
    # A push that failed leaves nothing behind.
    engine.push_weights(iter(weights))
    data = prompts(LENGTHS)
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) == greedy_answers(model, data)


def test_a_push_of_a_model_with_adapters_is_of_merged_weights(engine, model):
    data = prompts(LENGTHS)
    before = greedy_answers(model, data)
    adapted(model)
    expected = greedy_answers(model, data)
    assert expected != before, "the adapters change nothing"
    engine.push_weights(full_parameters(model))
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) == expected


def test_sleep_drops_the_weights(engine, model):
    assert engine.config.drops_weights
    engine.sleep()
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate(prompts([3]), GREEDY, seed=0)
    engine.push_weights(model.named_parameters())
    engine.generate(prompts([3]), GREEDY, seed=0)


def test_an_engine_that_keeps_its_memory_keeps_its_weights(engine, model, monkeypatch):
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, free_cache_engine=False))
    assert not engine.config.drops_weights
    engine.sleep()
    engine.wake()
    data = prompts(LENGTHS)
    assert real_tokens(engine.generate(data, GREEDY, seed=0)) == greedy_answers(model, data)


def test_an_answer_may_be_as_long_as_its_prompt_leaves_room_for(engine):
    assert engine.max_model_len == PROMPT + LIMIT
    room = [engine._params(GREEDY, length, False, LIMIT).max_tokens for length in (1, PROMPT, PROMPT + 5)]
    assert room == [LIMIT, LIMIT, 3]


def test_code_that_came_with_a_model_goes_with_its_config(alone, tmp_path, monkeypatch):
    from verl.workers.rollout.vllm_rollout import vllm_rollout

    monkeypatch.setattr(vllm_rollout, "VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folders = []
    for name in ("one", "the_same", "other"):
        source = tmp_path / name
        source.mkdir()
        (source / "modeling_own.py").write_text(f"OTHER = {name == 'other'}")
        config = tiny_model().config
        config.name_or_path, config.dtype = str(source), "float32" if name == "one" else "bfloat16"
        folders.append(vllm_rollout._model_folder(config, "OwnForCausalLM", "float32"))
    assert sorted(os.listdir(folders[0])) == ["config.json", "modeling_own.py"]
    assert json.loads((Path(folders[0]) / "config.json").read_text())["architectures"] == ["OwnForCausalLM"]
    # What vLLM compiles, it finds again by this name.
    assert folders[0] == folders[1] != folders[2]


class Recorder:
    """In place of vLLM on a GPU: notes what it is asked to do."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls += [f"wake {tag}" for tag in tags]

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def collective_rpc(self, load, args):
        self.calls.append("load")
        list(args[0])
        return [[]]

    def generate(self, requests, params, use_tqdm):
        self.calls.append("generate")
        answer = SimpleNamespace(token_ids=[EOS])
        return [SimpleNamespace(outputs=[answer] * params[0].n) for _ in requests]


def test_on_a_gpu_memory_comes_back_only_when_it_is_needed(engine, model, monkeypatch):
    """Weights and KV cache sleep apart: the trainer's shards and the engine's KV cache need not be there at once."""
    recorder = Recorder()
    monkeypatch.setattr(engine, "llm", recorder)
    monkeypatch.setattr(engine, "on_gpu", True)
    monkeypatch.setattr(engine, "_generators", lambda seed: nullcontext())
    monkeypatch.setattr(engine, "_asleep", set())
    monkeypatch.setattr(engine, "_has_weights", False)

    def calls(*actions):
        recorder.calls.clear()
        for action in actions:
            action()
        return recorder.calls

    def push():
        engine.push_weights(model.named_parameters())

    def generate():
        engine.generate(prompts([3]), GREEDY, seed=0)

    assert calls(engine.sleep, engine.sleep) == ["sleep 2"]
    step = ["wake weights", "load", "wake kv_cache", "reset", "generate", "sleep 2"]
    assert calls(push, generate, engine.sleep) == step
    assert calls(engine.wake, push, push, generate, generate, engine.sleep) == [
        "wake weights", "load", "load", "wake kv_cache", "reset", "generate", "reset", "generate", "sleep 2",
    ]  # fmt: skip
    # An engine that is awake in part does not go to sleep again by itself.
    assert calls(push, engine.sleep) == ["wake weights", "load", "wake kv_cache", "sleep 2"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"max_num_seqs": 1024}, {"max_cudagraph_capture_size": 1024}),
        ({"tensor_model_parallel_size": 2}, {"pass_config": {"fuse_allreduce_rms": False}}),
        ({"tensor_model_parallel_size": 2, "max_num_seqs": 1024, "enforce_eager": True}, {}),
    ],
)
def test_what_is_compiled_on_a_gpu_sums_through_nccl(changes, expected):
    config = SimpleNamespace(**{"max_num_seqs": 256, "tensor_model_parallel_size": 1, "enforce_eager": False} | changes)
    compilation = get_rollout_class("vllm")._compilation
    assert compilation(SimpleNamespace(on_gpu=True, config=config)) == expected
    assert compilation(SimpleNamespace(on_gpu=False, config=config)) == {}


@pytest.mark.parametrize("known", [False, True])
def test_a_family_that_vllm_cannot_run_is_refused(known, monkeypatch):
    from verl.workers.rollout.vllm_rollout import vllm_rollout

    families = {"Qwen2ForCausalLM": tiny_model(), "Qwen3_5ForCausalLM": recent("qwen3_5")}
    # As 0.26: Qwen3.5 of pictures and text alone. transformers' class keeps its state where vLLM has no part.
    archs = {"Qwen3_5ForConditionalGeneration"} | (families.keys() if known else set())
    monkeypatch.setattr(vllm_rollout.ModelRegistry, "get_supported_archs", lambda: archs)
    vllm_rollout.check_family(families["Qwen2ForCausalLM"])
    with nullcontext() if known else pytest.raises(ValueError, match=r"has no Qwen3_5ForCausalLM.*rollout.name=hf"):
        vllm_rollout.check_family(families["Qwen3_5ForCausalLM"])


def test_layers_with_several_cache_tensors_are_held_as_their_tensors():
    from verl.workers.rollout.vllm_rollout.vllm_rollout import list_cache_tensors

    attention, states = torch.ones(2), [torch.ones(3), torch.ones(1)]
    runner = SimpleNamespace(kv_caches=[attention, states], init_fp8_kv_scales=None)
    held = runner.kv_caches
    list_cache_tensors(SimpleNamespace(model_runner=runner))
    assert runner.kv_caches is held
    assert [id(cache) for cache in held] == [id(tensor) for tensor in (attention, *states)]
    other = SimpleNamespace(kv_caches=[states])
    list_cache_tensors(SimpleNamespace(model_runner=other))
    assert other.kv_caches == [states]


def test_too_little_memory_names_the_settings(engine):
    config = dataclasses.replace(engine.config, gpu_memory_utilization=1.0)
    with pytest.raises(RuntimeError, match=r"desired CPU memory utilization[\s\S]*rollout.gpu_memory_utilization"):
        get_rollout_class("vllm")(tiny_model().config, byte_tokenizer(), config, "cpu")
