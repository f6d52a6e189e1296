"""The packed forward against Hugging Face's own padded one."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.tiny import SIZES, answer_rows, causal_lm, scorer
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.layers import compile_layers, decoder_layers, recompute_layers
from verl.models.logits import PLAIN_LOGITS
from verl.models.packing import AnswerRows, pack

ROWS = ([5, 1, 3, 7], [4, 6, 1, 2])


def reference_log_probs(model: torch.nn.Module, rows: AnswerRows, temperature: float) -> torch.Tensor:
    """One row at a time, no padding at all: logits of the whole sequence, log-softmax, pick the answer's tokens."""
    result = torch.zeros(rows.responses.shape)
    for row in range(len(rows)):
        prompt = rows.prompts[row][rows.prompt_mask[row].bool()]
        answer = rows.responses[row][rows.response_mask[row].bool()]
        logits = model(torch.cat([prompt, answer])[None]).logits[0] / temperature
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, answer[:, None])[:, 0]
        result[row, : len(answer)] = picked
    return result


def test_rows_of_tokens_are_padded_outside():
    rows = AnswerRows.of_tokens([[5, 6, 7], (8,)], [torch.tensor([9]), [4, 3]])
    assert rows.prompts.tolist() == [[5, 6, 7], [0, 0, 8]] and rows.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert rows.responses.tolist() == [[9, 0], [4, 3]] and rows.response_mask.tolist() == [[1, 0], [1, 1]]


def test_pack_lays_rows_end_to_end():
    rows = AnswerRows(
        prompts=torch.tensor([[0, 11, 12], [21, 22, 23]]),
        prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        responses=torch.tensor([[13, 0], [24, 25]]),
        response_mask=torch.tensor([[1, 0], [1, 1]]),
    )
    packed = pack(rows)
    assert packed.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 25]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert packed.answer_index.tolist() == [2, 6, 7]
    assert packed.before_index.tolist() == [1, 5, 6]
    assert packed.answer_ids.tolist() == [13, 24, 25]
    assert packed.grid_index.tolist() == [0, 2, 3]
    layout = packed.layout
    assert layout.starts.tolist() == [0, 3, 8] and layout.longest == 5
    assert (layout.prompt_tokens, layout.answer_tokens) == (0, 0) and layout.prompt_starts.tolist() == [0]
    # Row 1 starts at the second line of a 2 x 5 grid.
    assert (layout.rows, layout.width) == (2, 5)
    assert layout.source.tolist() == [0, 1, 2, 0, 0, 3, 4, 5, 6, 7]
    assert layout.place.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


def test_pack_lays_a_shared_prompt_once():
    """The first two rows answer 11 12, the third answers 21: P P A | A A | P A."""
    rows = AnswerRows(
        prompts=torch.tensor([[11, 12], [11, 12], [0, 21]]),
        prompt_mask=torch.tensor([[1, 1], [1, 1], [0, 1]]),
        responses=torch.tensor([[13, 0], [14, 15], [22, 0]]),
        response_mask=torch.tensor([[1, 0], [1, 1], [1, 0]]),
    )
    assert rows.lengths() == [3, 4, 2]
    packed = pack(rows)
    assert packed.input_ids.tolist() == [[11, 12, 13, 14, 15, 21, 22]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert packed.answer_index.tolist() == [2, 3, 4, 6]
    assert packed.before_index.tolist() == [1, 1, 3, 5]
    layout = packed.layout
    # The prompt, its two answers, and the third row whole.
    assert layout.starts.tolist() == [0, 2, 3, 5, 7] and layout.longest == 2
    assert layout.prompt_tokens == 2 and layout.prompt_starts.tolist() == [0, 2]
    assert layout.answer_tokens == 3 and layout.answer_starts.tolist() == [0, 3]
    assert (layout.longest_answers, layout.longest_prompt) == (3, 2)
    assert layout.source.tolist() == [0, 1, 2, 0, 0, 1, 3, 4, 5, 6, 0, 0]
    assert layout.place.tolist() == [0, 1, 2, 6, 7, 8, 9]


def test_families_come_first_their_prompts_before_their_answers():
    rows = AnswerRows(
        prompts=torch.tensor([[11, 12], [21, 22], [21, 22], [31, 32], [31, 32]]),
        prompt_mask=torch.tensor([[1, 1], [0, 1], [0, 1], [1, 1], [1, 1]]),
        responses=torch.tensor([[13, 14], [23, 24], [25, 0], [33, 0], [34, 35]]),
        response_mask=torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0], [1, 1]]),
    )
    packed = pack(rows)
    assert packed.input_ids.tolist() == [[22, 31, 32, 23, 24, 25, 34, 35, 11, 12, 13, 14]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 1, 2, 1, 2, 3, 0, 1, 2, 3]]
    assert packed.answer_ids.tolist() == [13, 14, 23, 24, 25, 34, 35]
    assert packed.answer_index.tolist() == [10, 11, 3, 4, 5, 6, 7]
    assert packed.before_index.tolist() == [9, 10, 0, 3, 0, 2, 6]
    assert packed.grid_index.tolist() == [0, 1, 2, 3, 4, 8, 9]
    layout = packed.layout
    # An answer without a token has no segment.
    assert layout.starts.tolist() == [0, 1, 3, 5, 6, 8, 12] and layout.longest == 4
    assert layout.prompt_tokens == 3 and layout.prompt_starts.tolist() == [0, 1, 3] and layout.longest_prompt == 2
    assert layout.answer_tokens == 5 and layout.answer_starts.tolist() == [0, 3, 5] and layout.longest_answers == 3
    assert (layout.rows, layout.width) == (5, 4)
    assert layout.source.tolist() == [8, 9, 10, 11, 0, 3, 4, 0, 0, 5, 0, 0, 1, 2, 0, 0, 1, 2, 6, 7]
    assert layout.place.tolist() == [4, 12, 13, 5, 6, 9, 18, 19, 0, 1, 2, 3]


def test_only_neighbours_share_a_prompt():
    rows = answer_rows([3, 3, 3], [1, 2, 3])
    rows = AnswerRows(rows.prompts[[0, 1, 0]], rows.prompt_mask, rows.responses, rows.response_mask)
    assert rows.begins_family().tolist() == [True, True, True]
    # The same tokens behind another padding are another prompt.
    rows = AnswerRows(
        torch.zeros(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]), rows.responses[:2], rows.response_mask[:2]
    )
    assert rows.begins_family().tolist() == [True, True]


def test_a_row_without_prompt_is_refused():
    rows = answer_rows([2, 2], [1, 1])
    rows.prompt_mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        pack(rows)


@pytest.mark.parametrize("mask", ["prompt_mask", "response_mask"])
def test_padding_between_tokens_is_refused(mask):
    rows = answer_rows([3, 3], [3, 3])
    getattr(rows, mask)[1] = torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match=r"rows \[1\] have padding between tokens"):
        pack(rows)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("remove_padding", [True, False])
def test_log_probs_equal_hugging_face_row_by_row(family, remove_padding):
    rows = answer_rows(*ROWS, prompt_width=9, answer_width=8)
    expected = reference_log_probs(causal_lm(family).eval(), rows, temperature=0.7)
    log_probs, _ = PolicyModel(causal_lm(family), remove_padding)(rows, temperature=0.7)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_entropy_equals_torch_categorical():
    rows = answer_rows(*ROWS)
    model = causal_lm()
    _, entropy = PolicyModel(causal_lm())(rows, temperature=0.5, entropy="value")
    row = 1
    sequence = torch.cat([rows.prompts[row][rows.prompt_mask[row].bool()], rows.responses[row]])
    logits = model(sequence[None]).logits[0] / 0.5
    expected = torch.distributions.Categorical(logits=logits[0:6]).entropy()
    torch.testing.assert_close(entropy[row], expected, atol=1e-5, rtol=1e-5)
    assert entropy[2, 1:].eq(0).all()


@pytest.mark.parametrize("remove_padding", [True, False])
def test_scores_equal_the_token_classification_model(remove_padding):
    rows = answer_rows(*ROWS, answer_width=9)
    model = scorer().eval()
    values = ScoreModel(scorer(), remove_padding)(rows)
    for row, (prompt, answer) in enumerate(zip(*ROWS, strict=True)):
        sequence = torch.cat([rows.prompts[row][rows.prompt_mask[row].bool()], rows.responses[row][:answer]])
        expected = model(sequence[None]).logits[0, prompt:, 0]
        torch.testing.assert_close(values[row, :answer], expected, atol=1e-5, rtol=1e-5)
        assert values[row, answer:].eq(0).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_gradients_equal_the_padded_path(family):
    rows = answer_rows(*ROWS, prompt_width=9, answer_width=8)
    gradients = []
    for remove_padding in (True, False):
        module = PolicyModel(causal_lm(family), remove_padding)
        module(rows)[0].sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_checkpointing_changes_no_gradient():
    rows = answer_rows(*ROWS)
    gradients = []
    for checkpointing in (False, True):
        module = PolicyModel(causal_lm()).train()
        if checkpointing:
            module.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module(rows)[0].sum().backward()
        gradients.append(module.hf.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-6)


def test_neighbours_do_not_change_a_row():
    rows = answer_rows(*ROWS)
    module = ScoreModel(scorer())
    together = module(rows)
    alone = module(rows.select([2]))
    torch.testing.assert_close(together[2], alone[0], atol=1e-6, rtol=1e-6)


def test_entropy_has_a_gradient_only_when_asked():
    rows = answer_rows(*ROWS)
    module = PolicyModel(causal_lm())
    assert module(rows)[1] is None
    assert not module(rows, entropy="value")[1].requires_grad
    assert module(rows, entropy="grad")[1].requires_grad


def windowed(window: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, pad_token_id=0, eos_token_id=1))


def test_a_window_that_no_row_can_reach_is_nothing():
    """In a window of 9 a row's last token, the ninth, still attends to its first."""
    rows, model = answer_rows([5, 1, 3, 7], [4, 6, 1, 2]), windowed(9)
    expected = reference_log_probs(windowed(9), rows, 1.0)
    torch.testing.assert_close(PolicyModel(model)(rows)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("remove_padding", [True, False])
def test_a_row_longer_than_a_window_keeps_it(remove_padding):
    rows = answer_rows([5, 1, 3, 7], [4, 6, 1, 2])
    expected = reference_log_probs(windowed(4), rows, 1.0)
    torch.testing.assert_close(PolicyModel(windowed(4), remove_padding)(rows)[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, reference_log_probs(windowed(9), rows, 1.0), atol=1e-2)


def test_pack_says_which_keys_an_answer_sees_within_a_window():
    """The rows of the first of these tests of shared prompts, P P A | A A | P A, with a longer prompt: P0 P1 P2, A3,
    A4 A5, and P6 A7. In a window of 3 an answer's first token sees the last two of its prompt."""
    rows = AnswerRows(
        prompts=torch.tensor([[10, 11, 12], [10, 11, 12], [0, 0, 21]]),
        prompt_mask=torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1]]),
        responses=torch.tensor([[13, 0], [14, 15], [22, 0]]),
        response_mask=torch.tensor([[1, 0], [1, 1], [1, 0]]),
    )
    layout = pack(rows, window=3).layout
    assert layout.window == 3 and layout.starts.tolist() == [0, 3, 4, 6, 8]
    assert layout.window_keys.tolist() == [0, 1, 2, 1, 2, 3, 1, 2, 4, 5, 6, 7]
    assert layout.window_starts.tolist() == [0, 3, 6, 10, 12] and layout.longest_window == 4
    # A window of 1 is the token itself; one of 5 is out of reach of the longest row's five tokens.
    assert pack(rows, window=1).layout.window_keys.tolist() == [*range(8)]
    beyond = pack(rows, window=5).layout
    assert beyond.window == 0 and not len(beyond.window_keys) and beyond.window_starts.tolist() == [0]
    apart = pack(rows.select([1, 2]), window=3).layout
    assert apart.window == 3 and not len(apart.window_keys)


def test_models_that_change_their_logits_are_right_or_refused():
    """Cohere multiplies them by a number of its config. An entry that a class does not read is nothing."""

    def cohere():
        torch.manual_seed(0)
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5, pad_token_id=0, eos_token_id=1))

    rows = answer_rows(*ROWS)
    expected = reference_log_probs(cohere().eval(), rows, 0.7)
    torch.testing.assert_close(PolicyModel(cohere())(rows, 0.7)[0], expected, atol=1e-5, rtol=1e-5)
    model = causal_lm()
    model.config.logit_scale = 0.5
    assert PolicyModel(model).form == PLAIN_LOGITS


@pytest.mark.parametrize(("share", "layers"), [(0.0, []), (0.34, [0, 2, 5]), (0.5, [0, 2, 4]), (1.0, [*range(6)])])
def test_a_share_of_the_layers_is_recomputed(share, layers):
    """By hand, of six layers: ceil(6 share) of them, evenly, the first one among them."""
    config = {**causal_lm().config.to_dict(), "num_hidden_layers": 6, "layer_types": None}
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    recompute_layers(model, share)
    assert [i for i, layer in enumerate(decoder_layers(model)) if layer.gradient_checkpointing] == layers


def test_compiled_layers_give_the_same_on_the_same_few_graphs():
    """Lengths, rows and tokens change at every step; the number of graphs does not."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = PolicyModel(causal_lm()), PolicyModel(causal_lm())
    compile_layers(compiled.hf)
    graphs = []
    for lengths in (ROWS, ([3, 3, 2], [4, 2, 7]), ([7, 2, 2, 8, 5], [1, 6, 6, 2, 2]), ([2] * 9, [1] * 9)):
        rows = answer_rows(*lengths)
        for module in (plain, compiled):
            module.zero_grad()
            module(rows)[0].sum().backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # One for the first batch, perhaps another for the first of another shape; then none.
    assert 1 <= graphs[1] <= 2 and graphs[-1] == graphs[1], graphs
