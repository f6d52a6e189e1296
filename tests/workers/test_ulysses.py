"""Updates, log-probs and scores do not depend on how many ranks share the tokens of their rows."""

import pytest
import torch

from tests.tiny import answer_rows, causal_lm
from tests.workers import ulysses_ranks
from tests.workers.ulysses_ranks import log_probs_and_scores
from tests.workers.updates_setup import ANSWERS, CRITIC_LOSSES, LOSSES, PROMPTS, batch, settings, update
from verl.models.answer_models import PolicyModel
from verl.models.sequence_parallel import Shard
from verl.workers.updates import split_rows

pytestmark = pytest.mark.distributed

# Policy losses with entropy, KL, anchor and weights, SFT, pairs; the four of the discriminator.
TWO = [(loss, "tokens") for loss in LOSSES] + [("gspo", "whole"), ("ppo", "rows"), ("ranking", "whole")]
# Two groups of two, and one of four with half as many key heads.
FOUR = [("gspo-anchor", "tokens"), ("sft", "rows"), ("soda", "tokens"), ("hinge-adaptive", "tokens")]


@pytest.mark.parametrize(("ranks", "size", "runs"), [(2, 2, TWO), (4, 2, FOUR), (4, 4, FOUR)])
def test_updates_are_those_of_one_rank(ranks, size, runs, tmp_path):
    torch.multiprocessing.spawn(ulysses_ranks.run, args=(ranks, size, runs, tmp_path), nprocs=ranks)
    for loss, split in runs:
        module, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}-{split}.pt", weights_only=True)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                result["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-5,
                msg=lambda m, what=(loss, split, name): f"{what}: {m}",
            )  # fmt: skip
        assert result["metrics"].keys() == expected.keys(), loss
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (loss, split, name)
    # What a user's policy loss is given counts every row once.
    counted = torch.load(tmp_path / "counted.pt", weights_only=True)
    tokens = float(batch().batch["response_mask"].sum())
    assert counted == {"dp_size": ranks // size, "batch_num_tokens": tokens, "global_batch_size": PROMPTS * ANSWERS}
    first = batch()[: PROMPTS * size // ranks]
    computed = torch.load(tmp_path / "computed.pt", weights_only=True)
    for name, value in log_probs_and_scores(first).items():
        torch.testing.assert_close(computed[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_loss_is_among_them():
    assert {loss for loss, _ in TWO} == LOSSES.keys() and len(CRITIC_LOSSES) == 4


def test_a_micro_batch_holds_as_many_tokens_of_each_rank():
    module, rows = PolicyModel(causal_lm(), proven=True), answer_rows([5, 1, 9], [3, 8, 2])
    # 8, 9 and 11 tokens: two rows of 17 on one rank of 17, or on two of 9; all on one of 28 or two of 14.
    assert len(split_rows(rows, module, True, 17, None)) == 2
    module.shard = Shard(0, 2, group=None)
    assert [len(split_rows(rows, module, True, tokens, None)) for tokens in (8, 9, 13, 14)] == [3, 2, 2, 1]
    assert [index for index in split_rows(rows, module, False, 0, 2)] == [[0, 1], [2]], "rows are those of all ranks"
