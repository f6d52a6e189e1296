"""Prompts as a discriminator reads them whose tokenizer is not the student's: its own chat template and tokens.

Shapes: P' = max_prompt_length of the discriminator, in its tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from verl.utils.dataset.looks import Looker, look_at_all
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.rows import SHOWN_BAD_ROWS, Rows, refuse
from verl.utils.dataset.texts import Messages, Tokenization
from verl.utils.torch_functional import Truncation, postprocess_data

logger = logging.getLogger(__name__)

IDS, MASK = "critic_input_ids", "critic_attention_mask"


@dataclass(frozen=True)
class OwnLimits:
    """The most tokens of a prompt and of an answer, and the side on which longer prompts are cut."""

    prompt: int
    response: int
    truncation: Truncation


class OwnPrompts(Dataset):
    """The rows of a dataset with two columns more: `critic_input_ids` and `critic_attention_mask`, (P',), the prompt
    in the discriminator's tokens, left-padded, and cut as `limits` say.

    Args:
        rows: the student's dataset, whose rows stay as they are.
        tokenization: how the discriminator reads a conversation.

    Raises:
        ValueError: the discriminator's chat template refuses a row, or with truncation "error" a prompt is too long.
    """

    def __init__(self, rows: RLHFDataset, tokenization: Tokenization, limits: OwnLimits):
        self.of_student, self.tokenization, self.limits = rows, tokenization, limits
        self._look_at_all()

    def __len__(self) -> int:
        return len(self.of_student)

    def __getitem__(self, item: int) -> dict[str, Any]:
        ids, mask = self._prompt(self.of_student.messages(item))
        return {**self.of_student[item], IDS: ids, MASK: mask}

    def _prompt(self, messages: Messages) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (P',) each."""
        ids = torch.tensor(self.tokenization.prompts([messages]))
        padded, mask = postprocess_data(
            ids,
            torch.ones_like(ids),
            self.limits.prompt,
            self.tokenization.tokenizer.pad_token_id,
            truncation=self.limits.truncation,
        )
        return padded[0], mask[0]

    def _look_at_all(self) -> None:
        """Try the discriminator's template on every row, and count the tokens that do not fit."""
        rows, config = self.of_student.rows, self.of_student.config
        looker = Looker(self.tokenization, config.prompt_key, config.response_key, counts_prompts=True)
        # The first rows of a file are looked at; those that the student's dataset has left out do not count.
        first = Rows(rows.files, np.arange(rows.chosen.max() + 1))
        seen = look_at_all(first, looker, config.filter_overlong_prompts_workers, self.of_student.cache)[rows.chosen]
        faulty = [number for number, fault in enumerate(seen.faults) if fault is not None]
        refuse(
            [f"{rows[number].place}: {seen.faults[number]}" for number in faulty[:SHOWN_BAD_ROWS]],
            f"{len(faulty)} of {len(rows)} rows cannot be read by the discriminator",
            "Its own chat template and tokenizer are tried on them: leave these rows out, or use another discriminator",
            len(faulty),
        )
        self._say_lengths(seen.prompt_tokens, seen.answer_tokens)

    def _say_lengths(self, prompts: np.ndarray, answers: np.ndarray) -> None:
        limits, rows = self.limits, self.of_student.rows
        long = np.flatnonzero(prompts > limits.prompt)
        if len(long) and limits.truncation == "error":
            raise ValueError(
                f"the prompt of {rows[int(long[0])].place} (counted from 0) has {prompts[long[0]]} tokens of the "
                f"discriminator's tokenizer, more than critic.max_prompt_length={limits.prompt}; so have {len(long)} "
                f"of {len(rows)} prompts: critic.max_prompt_length={prompts.max()} fits them all, data.truncation="
                "left, right or middle cuts them"
            )
        for what, counts, limit in (("prompt", prompts, limits.prompt), ("response", answers, limits.response)):
            cut = int((counts > limit).sum())
            logger.log(
                logging.WARNING if cut else logging.INFO,
                "%d of %d %s do not fit critic.max_%s_length=%d in the discriminator's tokens%s; the longest has %d",
                cut, len(counts), {"prompt": "prompts", "response": "teacher answers"}[what], what, limit,
                " and are cut" if cut else "", counts.max(),
            )  # fmt: skip
