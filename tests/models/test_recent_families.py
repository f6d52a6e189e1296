"""Windows, caps, sinks and linear attention in packed rows with shared prompts: against Hugging Face, row by row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM

from tests.models.test_shared_prompts import plain_backward, plain_forward
from tests.recent_families import FAMILIES, WINDOW, recent, recent_scorer
from tests.tiny import answer_rows
from verl.models import attention, flash
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.capped_attention import capped_attention
from verl.models.layers import compile_layers, recompute_layers
from verl.models.loading import find_class
from verl.models.packing import AnswerRows
from verl.models.proof import check_class, class_verdict, proof_rows, prove
from verl.models.row_mixers import costs_beside_packing

WINDOWED = ["gemma2", "gemma3", "gpt_oss", "olmo3", "phi3"]


def rows_beyond_the_window() -> AnswerRows:
    """Prompts of 12, 5, 1 and 9 tokens, three answers to the first, two to the last; the longest row has 26 tokens."""
    first = [0, 0, 0, 3, 4, 5, 5]
    rows = answer_rows([12, 12, 12, 5, 1, 9, 9], [9, 1, 14, 13, 3, 2, 7])
    return AnswerRows(rows.prompts[first], rows.prompt_mask[first], rows.responses, rows.response_mask)


def row_by_row(model, rows, temperature=1.0):
    """Each row alone through the class's own forward and attention, with a gradient."""
    model.set_attn_implementation("eager")
    values = []
    for prompt, answer in rows.unpadded():
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        values.append(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def run(compute, parameters, *arguments):
    """Values, and gradients of a weighted sum of them."""
    values = compute(*arguments)
    weights = torch.linspace(-1, 2, values.numel()).view(values.shape)
    gradients = torch.autograd.grad((weights * values).sum(), parameters, allow_unused=True)
    return values, gradients


def assert_equal_runs(ours, expected, names):
    torch.testing.assert_close(ours[0], expected[0], atol=2e-5, rtol=1e-5)
    for name, actual, gradient in zip(names, ours[1], expected[1], strict=True):
        if gradient is not None:
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                actual, gradient, atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=lambda m, n=name: n + m
            )
        else:
            assert actual is None or not actual.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_hugging_faces_row_by_row(family):
    rows, model = rows_beyond_the_window(), recent(family)
    expected = run(row_by_row, list(model.parameters()), model, rows, 0.7)
    module = PolicyModel(recent(family))
    assert module.verdict.longest is None
    names, parameters = zip(*module.named_parameters(), strict=True)
    assert_equal_runs(run(lambda: module(rows, 0.7)[0], parameters), expected, names)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_together_are_rows_alone_and_recomputed_ones_the_same(family):
    """Of a discriminator: values and gradients do not depend on neighbours, shared prompts or recomputed layers."""
    model = recent_scorer(family)
    module, rows = ScoreModel(model), rows_beyond_the_window()
    names, parameters = zip(*module.named_parameters(), strict=True)
    alone = run(lambda: torch.cat([module(rows.select([row])) for row in range(len(rows))]), parameters)
    assert_equal_runs(run(module, parameters, rows), alone, names)
    recompute_layers(model, 1.0)
    assert_equal_runs(run(module.train(), parameters, rows), alone, names)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_5"])
def test_a_padded_model_is_a_packed_one(family):
    rows = rows_beyond_the_window()
    packed, padded = PolicyModel(recent(family))(rows)[0], PolicyModel(recent(family), remove_padding=False)(rows)[0]
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-5)


@pytest.fixture
def no_code(monkeypatch):
    """Compiled graphs are traced and differentiated, and run as they are: making their code takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize(("family", "compiled"), [("gemma3", False), ("gpt_oss", False), ("gpt_oss", True)], ids=str)
@pytest.mark.usefixtures("no_code")
def test_a_model_on_the_flash_path_is_that_on_the_grid(family, compiled, monkeypatch):
    """With kernels in plain PyTorch. Compiled, a layer with a window and one without have a graph each, and again for
    micro-batches in which no prompt is shared; nothing breaks a graph, and lengths take no more."""
    monkeypatch.setattr(flash, "_kernel_forward", plain_forward)
    monkeypatch.setattr(flash, "_kernel_backward", plain_backward)
    torch._dynamo.reset()
    counters.clear()
    modules = {on: PolicyModel(recent(family)) for on in (False, True)}
    if compiled:
        compile_layers(modules[True].hf)
    rows = rows_beyond_the_window()
    graphs = []
    for part in (rows, rows.select([0, 3]), rows.select([0, 1, 2, 5, 6]), rows.select([3, 5])):
        results = []
        for on, module in modules.items():
            monkeypatch.setattr(attention, "has_kernel", lambda *_, on=on: on)
            names, parameters = zip(*module.named_parameters(), strict=True)
            results.append(run(lambda module=module, part=part: module(part)[0], parameters))
        assert_equal_runs(results[1], results[0], names)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == ([2, 4, 4, 4] if compiled else [0, 0, 0, 0]) and not counters["graph_break"]


@pytest.mark.parametrize(("family", "kind"), [("gemma2", "sliding_attention"), ("qwen3_5", "linear_attention")])
@pytest.mark.usefixtures("no_code")
def test_compiled_layers_give_the_same(family, kind):
    torch._dynamo.reset()
    plain, compiled = (
        PolicyModel(recent(family, num_hidden_layers=1, layer_types=[kind]), proven=True) for _ in range(2)
    )
    compile_layers(compiled.hf)
    rows = rows_beyond_the_window()
    runs = []
    for module in (compiled, plain):
        names, parameters = zip(*module.named_parameters(), strict=True)
        runs.append(run(lambda module=module: module(rows)[0], parameters))
    assert_equal_runs(*runs, names)


# ---------------------------------------------------------------------------------------------------------------------
# Capped scores and sinks


def reference(query, key, value, sinks, scaling, softcap, window):
    """One softmax over the keys that are seen and the sink, by torch."""
    groups, width = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    unseen = [[at > to or bool(window and at <= to - window) for at in range(width)] for to in range(width)]
    scores = scores.masked_fill(torch.tensor(unseen), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :width] @ value


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (0.0, True), (2.0, True)])
def test_capped_attention_is_torchs_softmax(window, softcap, with_sinks):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 7, 6), (3, 2, 7, 6), (3, 2, 7, 5), (4,)]
    states = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sinks = states[3] if with_sinks else None
    used = states if with_sinks else states[:3]
    ours = run(lambda: capped_attention(*states[:3], sinks, 0.7, softcap, window), used)
    expected = run(lambda: reference(*states[:3], sinks, 0.7, softcap, window), used)
    for actual, exact in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-10)


def test_a_cap_and_a_sink_by_hand():
    """One query of two keys: scores 0 and 2 capped at 2 are 0 and 2 tanh(1) = 1.5232; with a sink of 1 the
    exponentials are 1, 4.5868 and 2.7183, and of values 1 and 3 the output is (1 + 3 * 4.5868) / 8.3051 = 1.7773."""
    query, key = torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
    value = torch.tensor([[[[1.0], [3.0]]]])
    output = capped_attention(query, key, value, torch.tensor([1.0]), 1.0, 2.0, 0)
    assert output[0, 0, 1, 0].item() == pytest.approx(1.7773, abs=1e-4)
    # The first token sees itself, of score 0, and the sink: 1 / (1 + 2.7183).
    assert output[0, 0, 0, 0].item() == pytest.approx(0.2689, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_is_one_token_off_is_found_before_anything_starts(family, monkeypatch):
    """Its rows are then right up to the window alone. The config is new, since verdicts are kept."""
    model = recent(family, sliding_window=11)
    exact = attention._reached
    monkeypatch.setattr(attention, "_reached", lambda window, layout: (w := exact(window, layout)) and w + 1)
    verdict = class_verdict(PolicyModel, type(model), model.config, True)
    assert (verdict.fault, verdict.longest, verdict.reason) == (None, 11, "sliding_window=11")
    with pytest.raises(ValueError, match=r"lose their window, beyond 11 tokens.*rows may have 12.*use_remove_padding"):
        check_class(PolicyModel, type(model), model.config, True, longest=12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_right_on_their_own_weights(family, dtype):
    model = PolicyModel(recent(family).to(dtype))
    prove(model, dtype)


def test_real_weights_are_compared_beyond_a_short_window(monkeypatch):
    """The shared prompt of the proof's rows has as many tokens as the window: 8, and answers of 6 and 4."""
    model = PolicyModel(recent("gemma3"))
    assert proof_rows(model.hf.config, shared=8).lengths() == [14, 12, 6]
    exact = attention._reached
    monkeypatch.setattr(attention, "_reached", lambda window, layout: 0 * exact(window, layout))
    with pytest.raises(ValueError, match="its values differ from those of Hugging Face's own forward"):
        prove(model, torch.float32)


def test_a_layer_with_another_window_than_the_config_says_is_refused():
    model = recent("gemma3")
    model.model.layers[0].self_attn.sliding_window = 5
    with pytest.raises(ValueError, match="packed for a window of 8 tokens, and a layer has one of 5"):
        PolicyModel(model, proven=True)(rows_beyond_the_window())


def test_rows_that_carry_a_state_into_the_next_are_found(monkeypatch):
    from verl.models import answer_models

    monkeypatch.setattr(answer_models, "run_on_rows", lambda mixer: None)
    model = recent("qwen3_5", rms_norm_eps=2e-6)
    with pytest.raises(ValueError, match="rows beside each other change each other's values"):
        PolicyModel(model)


def test_the_text_model_of_a_config_of_pictures_and_text_is_compared():
    """As Qwen3.5 is published: the auto class builds the text model, of the config's own part for it."""
    text = recent("qwen3_5").config.to_dict()
    config = Qwen3_5Config(text_config=text)
    assert find_class(config, "policy") is Qwen3_5ForCausalLM
    verdict = class_verdict(PolicyModel, Qwen3_5ForCausalLM, config, True)
    assert verdict.compared and verdict.fault is None


def test_what_costs_more_is_said():
    assert costs_beside_packing(recent("olmo3")) == costs_beside_packing(recent("gpt_oss")) == []
    (linear,) = costs_beside_packing(recent("qwen3_next"))
    assert linear.startswith("1 of 2 layers carry a state along a row")
    (capped,) = costs_beside_packing(recent("gemma2"))
    assert "computed plainly" in capped
    assert recent("gemma2").config.sliding_window == WINDOW
