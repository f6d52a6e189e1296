"""The interface of a generation engine: prompts in, answers out, and weights only through `push_weights`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from verl.config import RolloutConfig, SamplingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from verl.protocol import DataProto


class BaseRollout(ABC):
    """An engine on one rank. It starts with arbitrary weights and is of no use before the first push.

    A step's order is `push_weights`, `generate` (any number of times), `sleep`. An engine whose `sleep` drops the
    weights (`RolloutConfig.drops_weights`) needs the push every time; another keeps answering from the weights pushed
    last. All ranks make the same calls: pushing is collective, and so is generating where ranks share an engine.

    Args:
        model_config: of the policy's model.
        device: where the engine runs.
        eos_token_ids: the tokens that end an answer; None: the tokenizer's EOS and those of `model_config`.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        device: str,
        trust_remote_code: bool = False,
        eos_token_ids: Sequence[int] | None = None,
    ):
        # Here, because settings are checked against the engines' names long before a model's code is wanted.
        from verl.models.tokenizer import all_eos_token_ids

        self.config = config
        self.answer_in(tokenizer, eos_token_ids or all_eos_token_ids(tokenizer, model_config))
        self._build(model_config, device, trust_remote_code)

    def answer_in(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
        """From now on answers end at one of these tokens, and are padded with the tokenizer's."""
        self.tokenizer, self.eos_token_ids = tokenizer, list(eos_token_ids)

    @abstractmethod
    def _build(self, model_config: PretrainedConfig, device: str, trust_remote_code: bool) -> None:
        """Build the engine, with arbitrary weights."""

    def generate(
        self,
        prompts: DataProto,
        sampling: SamplingConfig,
        seed: int,
        report_log_probs: int = 0,
        longest: int | None = None,
    ) -> DataProto:
        """Answer prompts.

        Args:
            prompts: `input_ids` and `attention_mask`, (B, P), left-padded.
            sampling: how answers are drawn; `sampling.n` answers per prompt.
            seed: the draw is a function of it, the weights and the prompts.
            report_log_probs: for the first so many prompts, the engine's own log-probs at the sampling temperature.
            longest: tokens of an answer at most, where these are fewer than `response_length`, which T stays.

        Returns:
            B rows: `responses` and `response_mask` (B, N, T), the mask 1 up to and including the first EOS of any
            kind (`all_eos_token_ids`); `rollout_log_probs` (B, N, T), 0 where not reported or padded, and
            `rollout_log_probs_mask` (B,), 1 on the prompts reported.

        Raises:
            RuntimeError: the engine has none of the pushed weights (any more), where it can tell.
        """
        limit = self.config.response_length
        reported, longest = min(report_log_probs, len(prompts)), min(longest or limit, limit)
        return self._generate(prompts, sampling, seed, reported, longest)

    @abstractmethod
    def _generate(
        self, prompts: DataProto, sampling: SamplingConfig, seed: int, reported: int, longest: int
    ) -> DataProto:
        """`generate` of an engine: for the first `reported` of the prompts with log-probs, answers of at most `longest`
        tokens."""

    @abstractmethod
    def push_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take over whole tensors by their Hugging Face names: every parameter and persistent buffer once, and tied
        ones under one of their names.

        Args:
            weights: (name, tensor) pairs, tensors in their full shape.

        An engine that sleeps wakes as far as it needs to. Nothing that was computed with earlier weights outlives this.

        Raises:
            ValueError: other tensors than the model's came, or one twice, or one is missing.
        """

    @abstractmethod
    def sleep(self) -> None:
        """Give up what memory the engine can: with `drops_weights`, that of the weights and the KV cache."""

    @abstractmethod
    def wake(self) -> None:
        """Take back the memory that `push_weights` writes to; it does so itself where this was not called."""
