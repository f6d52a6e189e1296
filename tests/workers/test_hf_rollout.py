"""Generation: what comes out is what the pushed weights say, row by row."""

import dataclasses

import pytest
import torch

from tests.tiny import byte_tokenizer, causal_lm
from tests.workers.updates_setup import settings
from verl.batch import student_rows
from verl.config import SamplingConfig
from verl.models.answer_models import PolicyModel
from verl.protocol import DataProto
from verl.workers.rollout import get_rollout_class
from verl.workers.rollout.hf_rollout import HFRollout

EOS, LIMIT = 1, 8
GREEDY = SamplingConfig(n=1, do_sample=False, temperature=0.0, top_p=1.0, top_k=-1)


def sampled(n: int, temperature: float = 0.7) -> SamplingConfig:
    return SamplingConfig(n=n, do_sample=True, temperature=temperature, top_p=1.0, top_k=-1)


def prompts(lengths=(3, 6, 1)) -> DataProto:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 200, (len(lengths), 9), generator=generator)
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()
    return DataProto.from_dict({"input_ids": ids * mask, "attention_mask": mask})


def engine(model=None, pad_is_eos: bool = False, eos_token_ids=None, **changes) -> HFRollout:
    tokenizer = byte_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = model or causal_lm()
    config = dataclasses.replace(settings("gspo").actor_rollout_ref.rollout, **changes)
    rollout = HFRollout(model.config, tokenizer, config, "cpu", eos_token_ids=eos_token_ids)
    rollout.push_weights(model.named_parameters())
    return rollout


def model_that_ends() -> torch.nn.Module:
    """A model in which EOS is likely, so that answers end at different lengths."""
    model = causal_lm(tied=False)
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.std() * torch.sign(model.lm_head.weight.mean(0)) * 3
    return model


def greedy_by_hand(model, ids: torch.Tensor) -> list[int]:
    """No cache, no batch: one whole forward per token."""
    answer = []
    while len(answer) < LIMIT and (not answer or answer[-1] != EOS):
        sequence = torch.cat([ids, torch.tensor(answer, dtype=torch.long)])
        answer.append(model(sequence[None]).logits[0, -1].argmax().item())
    return answer


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_greedy_answers_equal_token_by_token_argmax(pad_is_eos):
    model, data = model_that_ends().eval(), prompts((3, 6, 1, 9, 2, 5))
    answered = engine(model, pad_is_eos).generate(data, GREEDY, seed=0)
    lengths = set()
    for row in range(len(data)):
        real = data.batch["attention_mask"][row].bool()
        expected = greedy_by_hand(model, data.batch["input_ids"][row][real])
        mask = answered.batch["response_mask"][row, 0]
        assert mask.tolist() == [1] * len(expected) + [0] * (LIMIT - len(expected))
        assert answered.batch["responses"][row, 0][mask.bool()].tolist() == expected
        lengths.add(len(expected))
    assert len(lengths) > 1, "rows must stop at different places for this to prove anything"


@pytest.mark.parametrize("from_config", [True, False])
def test_an_answer_ends_at_any_eos(from_config):
    """An answer ends at the tokenizer's EOS and at another of the model's, whichever comes first."""
    model, data = model_that_ends().eval(), prompts((3, 6, 1, 9, 2, 5))
    plain = engine(model).generate(data, GREEDY, seed=0).batch
    rows = zip(plain["responses"][:, 0], plain["response_mask"][:, 0].bool(), strict=True)
    whole = [ids[mask].tolist() for ids, mask in rows]
    other = max(whole, key=len)[2]
    expected = [answer[: answer.index(other) + 1] if other in answer else answer for answer in whole]
    assert {answer[-1] for answer in expected} >= {EOS, other} and expected != whole
    model.config.eos_token_id = [other] if from_config else EOS
    rollout = engine(model, eos_token_ids=None if from_config else (EOS, other))
    answered = rollout.generate(data, GREEDY, seed=0).batch
    for row, ids in enumerate(expected):
        assert answered["response_mask"][row, 0].tolist() == [1] * len(ids) + [0] * (LIMIT - len(ids))
        assert answered["responses"][row, 0].tolist() == ids + [0] * (LIMIT - len(ids))


def test_reported_log_probs_are_the_policys_at_the_sampling_temperature():
    model, data = model_that_ends(), prompts()
    answered = engine(model).generate(data, sampled(4), seed=1, report_log_probs=2)
    assert answered.batch["rollout_log_probs_mask"].tolist() == [1, 1, 0]
    data.union(answered)
    expected, _ = PolicyModel(model)(student_rows(data), temperature=0.7)
    reported = answered.batch["rollout_log_probs"].flatten(0, 1)
    torch.testing.assert_close(reported[:8], expected[:8], atol=1e-5, rtol=1e-4)
    assert reported[8:].eq(0).all()


def test_answers_may_be_cut_before_their_time():
    """Greedy, the beginning of what is written otherwise; no limit lets them grow longer than all may be."""
    data = prompts()
    whole = engine().generate(data, GREEDY, seed=0).batch["responses"]
    cut = engine().generate(data, GREEDY, seed=0, report_log_probs=3, longest=2).batch
    assert torch.equal(cut["responses"][..., :2], whole[..., :2])
    assert cut["response_mask"].tolist() == [[[1, 1] + [0] * (LIMIT - 2)]] * 3
    assert cut["rollout_log_probs"][..., :2].lt(0).all() and cut["rollout_log_probs"][..., 2:].eq(0).all()
    assert torch.equal(engine().generate(data, GREEDY, seed=0, longest=LIMIT + 5).batch["responses"], whole)


def test_answers_to_one_prompt_stay_together_and_batches_do_not_matter_to_greedy():
    data = prompts()
    whole = engine(max_num_seqs=64).generate(data, GREEDY, seed=0)
    parts = engine(max_num_seqs=1).generate(data, GREEDY, seed=0)
    assert torch.equal(whole.batch["responses"], parts.batch["responses"])
    assert engine().generate(data, sampled(5), seed=0).batch["responses"].shape == (3, 5, LIMIT)


def test_draws_are_a_function_of_the_seed():
    rollout, data = engine(), prompts()
    first, again, other = (rollout.generate(data, sampled(4), seed=s).batch["responses"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_follows_the_models_distribution():
    """2,000 draws of one token against the softmax at temperature 0.5: 3.5 standard deviations for the top token."""
    model, data = causal_lm().eval(), prompts((4,))
    real = data.batch["attention_mask"][0].bool()
    probabilities = (model(data.batch["input_ids"][0][real][None]).logits[0, -1] / 0.5).softmax(-1)
    rollout = engine(model, max_num_seqs=4000, response_length=1)
    drawn = rollout.generate(data, sampled(2000, temperature=0.5), seed=3).batch["responses"].flatten()
    top = probabilities.argmax()
    p = probabilities[top].item()
    assert (drawn == top).float().mean().item() == pytest.approx(p, abs=3.5 * (p * (1 - p) / 2000) ** 0.5)


def test_a_push_must_be_complete_and_known():
    rollout, weights = engine(), list(causal_lm().named_parameters())
    with pytest.raises(ValueError, match="1 weights were not pushed"):
        rollout.push_weights(iter(weights[1:]))
    with pytest.raises(ValueError, match="came twice"):
        rollout.push_weights(iter([*weights, weights[0]]))


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="unknown rollout 'sglang'"):
        get_rollout_class("sglang")
