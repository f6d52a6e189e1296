"""The offline scorer on a GPU gives the scores of the CPU."""

from __future__ import annotations

import numpy as np
import torch

from tests.tiny import scorer
from verl.models.answer_models import ScoreModel
from verl.tools.prompts import PromptAndAnswer
from verl.tools.score.model import Scoring, score_sequences


def test_scores_are_those_of_the_cpu(cuda):
    generator = torch.Generator().manual_seed(0)
    sequences = [
        PromptAndAnswer(*(torch.randint(2, 260, (length,), generator=generator).tolist() for length in lengths))
        for lengths in ((5, 3), (1, 40), (33, 2), (7, 7))
    ]
    scoring = Scoring(pooling="mean", exclude_eos=True)
    on_cpu, on_gpu = (
        score_sequences(ScoreModel(scorer()).to(device), sequences, scoring, eos_token_id=1, max_tokens=60)
        for device in ("cpu", cuda)
    )
    for name, values in on_cpu.items():
        np.testing.assert_allclose(on_gpu[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
