"""A discriminator whose tokenizer is not the student's: it reads the answers' text in its own tokens.

What the student wrote and what the teacher wrote take one way, from the student's tokens to text and from there to the
discriminator's, so that nothing but the text tells them apart. An answer that ended is closed with the discriminator's
EOS, one that was cut is not, whatever ended the student's. Prompts are the discriminator's own (`own_prompts.py`).

Shapes: P', T' tokens of a prompt and of an answer, in the discriminator's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from verl.batch import CRITIC_PROMPT_KEYS, GROUP_KEYS, columns, teacher_response_mask
from verl.config.run import Config
from verl.models.tokenizer import all_eos_token_ids, load_tokenizer
from verl.protocol import DataProto
from verl.trainer.ppo.discriminator_algos import closing_eos
from verl.utils.dataset.own_prompts import OwnLimits, OwnPrompts
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.texts import Tokenization
from verl.utils.dataset.tokenizer_checks import arguments_for, check_tokenizer
from verl.utils.torch_functional import pad_2d_list_to_length

logger = logging.getLogger(__name__)

# What a decoder makes of a character that the answer's end has cut in two, some for each of its bytes.
HALF_A_CHARACTER = "\ufffd"


def is_other(tokenizer: PreTrainedTokenizerBase, students: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer reads other ids than the student's, or ends answers with another."""
    return tokenizer.get_vocab() != students.get_vocab() or tokenizer.eos_token_id != students.eos_token_id


def own_limits(config: Config) -> OwnLimits:
    """The lengths of what a discriminator with a tokenizer of its own reads, in its tokens."""
    critic, data = config.critic, config.data
    return OwnLimits(
        critic.max_prompt_length or 2 * data.max_prompt_length,
        critic.max_response_length or 2 * data.max_response_length,
        data.truncation,
    )


class ReadAnswers(NamedTuple):
    """R answers in the discriminator's tokens: ids and mask (R, T'), and which of them did not fit, (R,)."""

    ids: torch.Tensor
    mask: torch.Tensor
    cut: torch.Tensor


@dataclass(frozen=True)
class OwnTokens:
    """Reads answers as the discriminator does.

    student: the student's tokenizer.
    eos_token_ids: what may end the student's and the teacher's answers.
    tokenization: how the discriminator reads conversations.
    """

    student: PreTrainedTokenizerBase
    eos_token_ids: Sequence[int]
    tokenization: Tokenization
    limits: OwnLimits

    @classmethod
    def of(cls, config: Config, student: PreTrainedTokenizerBase) -> OwnTokens | None:
        """Those of a run's discriminator; None if there is none, or it has the student's tokenizer.

        Raises:
            ValueError: its tokenizer has no chat template, or does not serve otherwise.
        """
        if not config.use_critic:
            return None
        model, special_text = config.critic.model, config.data.special_token_text
        tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
        if not is_other(tokenizer, student):
            return None
        given = config.data.apply_chat_template_kwargs
        check_tokenizer(tokenizer)
        known = arguments_for(tokenizer, given)
        limits = own_limits(config)
        left_out = sorted(given.keys() - known.keys())
        logger.info(
            "the discriminator in %s has a tokenizer of its own: it reads the text of answers, in at most %d + %d of "
            "its tokens, under its own chat template%s",
            model.path, limits.prompt, limits.response,
            f", which does not know data.apply_chat_template_kwargs.{', '.join(left_out)}" if left_out else "",
        )  # fmt: skip
        ends = all_eos_token_ids(student, config.actor_rollout_ref.model.path)
        return cls(student, ends, Tokenization(tokenizer, known, None, special_text), limits)

    @property
    def eos_token_id(self) -> int:
        """What closes answers in the discriminator's tokens."""
        return self.tokenization.tokenizer.eos_token_id

    def with_prompts(self, rows: RLHFDataset) -> Dataset:
        """The student's dataset with the discriminator's prompts; see `OwnPrompts` for what it refuses."""
        return OwnPrompts(rows, self.tokenization, self.limits)

    def groups(self, answered: DataProto) -> tuple[DataProto, dict[str, float]]:
        """The columns of groups (`GROUP_KEYS`) in the discriminator's tokens.

        Args:
            answered: a table with prompts in both tokens, and answers (B, N, T) in the student's.

        Returns:
            the groups, with (B, P'), (B, T'), (B, N, T') columns, and `critic/own_tokens/*`: the shares of answers
            that did not fit, and the discriminator's tokens for each token of the student's answers.

        Raises:
            ValueError: the discriminator's prompts are missing.
        """
        read = columns(answered, CRITIC_PROMPT_KEYS + GROUP_KEYS).batch
        missing = [name for name in CRITIC_PROMPT_KEYS if name not in read]
        if missing:
            raise ValueError(
                f"the discriminator has a tokenizer of its own, and the rows have no {' and no '.join(missing)}: "
                "expected a dataset with its prompts (verl.utils.dataset.own_prompts.OwnPrompts); wrap the dataset, "
                "or use a discriminator with the student's tokenizer"
            )
        prompts, prompt_mask = (read[name] for name in CRITIC_PROMPT_KEYS)
        groups, answers = read["responses"].shape[:2]
        teacher = self.answers(read["teacher_response"], teacher_response_mask(answered))
        students = self.answers(read["responses"].flatten(0, 1), read["response_mask"].flatten(0, 1))
        metrics = {
            "critic/own_tokens/student_cut_ratio": students.cut.float().mean().item(),
            "critic/own_tokens/teacher_cut_ratio": teacher.cut.float().mean().item(),
            "critic/own_tokens/per_token": students.mask.sum().item() / max(1, read["response_mask"].sum().item()),
        }
        made = {
            "input_ids": prompts,
            "attention_mask": prompt_mask,
            "teacher_response": teacher.ids,
            "teacher_attention_mask": torch.cat([prompt_mask, teacher.mask], dim=-1),
            "responses": students.ids.view(groups, answers, -1),
            "response_mask": students.mask.view(groups, answers, -1),
        }
        return DataProto.from_dict(made), metrics

    def answers(self, ids: torch.Tensor, mask: torch.Tensor) -> ReadAnswers:
        """Answers (R, T) in the student's tokens, read in the discriminator's."""
        closing = closing_eos(ids, mask, self.eos_token_ids)
        ended = closing.any(-1).tolist()
        texts = self._texts(ids, mask.bool() & ~closing, ended)
        limit, end = self.limits.response, self.eos_token_id
        whole = [self._closed(row, is_whole) for row, is_whole in zip(self._tokenized(texts), ended, strict=True)]
        kept = [row[:limit] for row in whole]
        lengths = torch.tensor([len(row) for row in kept])
        return ReadAnswers(
            pad_2d_list_to_length(kept, end, limit),
            (torch.arange(limit) < lengths.unsqueeze(-1)).long(),
            torch.tensor([len(row) > limit for row in whole]),
        )

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor, ended: Sequence[bool]) -> list[str]:
        """The answers' texts as they were written: a special token that the student wrote is seen by its name."""
        rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        texts = self.student.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [
            text if is_whole else text.rstrip(HALF_A_CHARACTER) or text
            for text, is_whole in zip(texts, ended, strict=True)
        ]

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        splits = self.tokenization.special_text == "text"
        return self.tokenization.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=splits)[
            "input_ids"
        ]

    def _closed(self, ids: list[int], ended: bool) -> list[int]:
        """With one EOS where the answer ended, and none where it was cut. An answer without a token is the EOS alone:
        it must have a score too."""
        end = self.eos_token_id
        while ids and ids[-1] == end:
            ids = ids[:-1]
        return [*ids, end] if ended or not ids else ids
