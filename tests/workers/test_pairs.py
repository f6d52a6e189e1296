"""SODA's update on one rank: what a pair is, against transformers' own log-probs. That its gradient does not depend on
micro-batches, padding and ranks is in `test_updates.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import causal_lm
from tests.workers.updates_setup import PROMPTS, batch, pairs_of, settings, update
from verl.batch import pair_rows
from verl.models.answer_models import PolicyModel
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.pairs import PairPolicy

SODA = settings("soda", overrides=["soda.sft_coef=0"])


def sums_by_transformers(model, rows):
    """Each row's log-prob at temperature 1, by a padded forward of the whole model."""
    ids, mask = torch.cat([rows.prompts, rows.responses], -1), torch.cat([rows.prompt_mask, rows.response_mask], -1)
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    start = rows.prompts.shape[1]
    token_log_probs = logits.log_softmax(-1)[:, start - 1 : -1].gather(-1, rows.responses.unsqueeze(-1)).squeeze(-1)
    return (token_log_probs * rows.response_mask).sum(-1)


def policy(split="whole", module=None):
    group = settings("soda", split).actor_rollout_ref
    module = module or PolicyModel(causal_lm(), group.model.use_remove_padding)
    return PairPolicy(
        DataParallelPPOActor(group.actor, group.rollout, module, torch.optim.SGD(module.parameters(), lr=0.0))
    )


def test_rows_of_a_pair_stand_next_to_each_other():
    data = pairs_of(batch())
    rows = pair_rows(data)
    assert len(rows) == 2 * PROMPTS
    assert torch.equal(rows.responses[::2], data.batch["teacher_response"])
    assert torch.equal(rows.responses[1::2], data.batch["responses"][:, 0])
    assert [tokens > 0 for tokens in rows.shared_prompts()] == [False, True] * PROMPTS


@pytest.mark.parametrize("split", ["whole", "tokens", "rows", "padded"])
def test_reference_log_probs_are_the_models_own_sums(split):
    """At temperature 1, though the rollout's is 0.7."""
    data = pairs_of(batch())
    found = policy(split).compute_log_prob(data)
    with torch.no_grad():
        expected = sums_by_transformers(causal_lm(), pair_rows(data)).view(PROMPTS, 2)
    torch.testing.assert_close(found["chosen_ref_log_prob"], expected[:, 0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["rejected_ref_log_prob"], expected[:, 1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("per_token", "sft_coef"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_loss_and_gradient_are_the_formulas_on_transformers_log_probs(per_token, sft_coef):
    data = pairs_of(batch())
    rows, model = pair_rows(data), causal_lm()
    lengths = rows.response_mask.sum(-1).view(PROMPTS, 2)
    references = torch.stack([data.batch["chosen_ref_log_prob"], data.batch["rejected_ref_log_prob"]], -1)
    log_probs = sums_by_transformers(model, rows).view(PROMPTS, 2)
    ratios = (log_probs - references) / (lengths if per_token else 1)
    dpo = -F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    sft = -(log_probs[:, 0] / lengths[:, 0]).mean()
    (dpo + sft_coef * sft).backward()

    config = settings("soda", overrides=[f"soda.length_normalized={per_token}", f"soda.sft_coef={sft_coef}"])
    module, metrics = update("soda", config, batch())
    assert metrics["actor/soda_loss"] == pytest.approx(dpo.item(), abs=1e-6)
    assert metrics.get("actor/sft_loss") == (pytest.approx(sft.item(), rel=1e-6) if sft_coef else None)
    for (name, ours), theirs in zip(module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_pair_of_equal_answers_has_no_gradient():
    """The last prompt's student wrote what the teacher wrote."""
    module, metrics = update("soda", SODA, batch()[3:])
    # Rounding apart: the two rows stand in different places.
    assert metrics["actor/grad_norm"] < 1e-5
    assert max(parameter.grad.abs().max().item() for parameter in module.parameters()) < 1e-5


def test_pairs_are_never_split_and_share_their_prompt():
    """Tokens of the pairs: prompts of 5, 1, 9, 3, teachers of 3, 8, 2, 6 and students of 8, 2, 5, 6; the budget of 20
    holds no two of them, and one row per micro-batch is asked for where rows are counted."""
    data = pairs_of(batch())
    for split, expected in [("whole", [58]), ("tokens", [16, 11, 16, 15]), ("rows", [16, 11, 16, 15])]:
        seen = []
        module = PolicyModel(causal_lm())
        module.hf.model.embed_tokens.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0].numel()))
        policy(split, module).update(data, SODA.soda)
        assert sorted(seen) == sorted(expected), split


def test_several_mini_batches_and_epochs_step_each_time():
    overrides = ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_epochs=3"]
    group = settings("soda", overrides=overrides).actor_rollout_ref
    module, steps = PolicyModel(causal_lm()), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    PairPolicy(DataParallelPPOActor(group.actor, group.rollout, module, optimizer)).update(pairs_of(batch()), SODA.soda)
    assert len(steps) == 2 * 3
