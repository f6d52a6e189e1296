"""One engine over several ranks."""

import pytest
import torch

from tests.vllm import engine_on_two_ranks
from tests.vllm.tiny_engine import (
    LIMIT,
    TEMPERATURE,
    greedy_answers,
    prompts,
    real_tokens,
    start_engine,
    tiny_model,
)
from verl.batch import student_rows
from verl.models.answer_models import PolicyModel
from verl.protocol import DataProto

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]


def test_ranks_that_share_an_engine_get_the_answers_to_their_own_prompts(tmp_path):
    torch.multiprocessing.spawn(engine_on_two_ranks.run, args=(2, tmp_path), nprocs=2)
    model = tiny_model()
    for rank, lengths in enumerate(engine_on_two_ranks.LENGTHS):
        answers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        data = prompts(lengths)
        greedy = DataProto.from_dict(answers["greedy"])
        assert real_tokens(greedy) == greedy_answers(model, data)

        first, again = answers["first"], answers["again"]
        assert first["responses"].shape == (len(lengths), 3, LIMIT)
        assert torch.equal(first["responses"], again["responses"])
        # Each rank's own first prompt is reported.
        assert first["rollout_log_probs_mask"].tolist() == [1] + [0] * (len(lengths) - 1)
        data.union(DataProto.from_dict(first))
        expected, _ = PolicyModel(tiny_model())(student_rows(data), temperature=TEMPERATURE)
        torch.testing.assert_close(first["rollout_log_probs"][0], expected[:3].detach(), atol=1e-3, rtol=0)
        assert first["rollout_log_probs"][1:].eq(0).all()


def test_ranks_must_divide_into_engines(alone):
    with pytest.raises(ValueError, match="tensor_model_parallel_size=2 does not divide 1 ranks"):
        start_engine(tensor_model_parallel_size=2)
