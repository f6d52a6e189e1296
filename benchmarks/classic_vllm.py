"""The classic way of generating with vLLM: every answer is turned into text, and every token's log-prob comes back."""

from __future__ import annotations

from typing import NamedTuple
from unittest.mock import patch

from vllm import LLM, RequestOutput, SamplingParams

from verl.config import SamplingConfig
from verl.protocol import DataProto
from verl.workers.rollout.vllm_rollout import vllm_rollout
from verl.workers.rollout.vllm_rollout.vllm_rollout import VLLMRollout


class ChosenLogProbs(NamedTuple):
    """The log-probs of an answer's own tokens, where the trainer's engine looks for them."""

    logprobs: list[float]


class ClassicVLLMRollout(VLLMRollout):
    """The trainer's engine with a tokenizer in it, text for every answer, and a dict of log-probs for every token."""

    def _start(self, folder: str, trust_remote_code: bool) -> LLM:
        def with_tokenizer(**settings) -> LLM:
            return LLM(**{**settings, "skip_tokenizer_init": False, "tokenizer": self.tokenizer.name_or_path})

        with patch.object(vllm_rollout, "LLM", with_tokenizer):
            return super()._start(folder, trust_remote_code)

    def _generate(
        self, prompts: DataProto, sampling: SamplingConfig, seed: int, reported: int, longest: int
    ) -> DataProto:
        """As the trainer's own, with log-probs of all answers."""
        return super()._generate(prompts, sampling, seed, len(prompts), longest)

    def _params(self, sampling: SamplingConfig, prompt_length: int, report: bool, longest: int) -> SamplingParams:
        params = super()._params(sampling, prompt_length, report, longest)
        params.detokenize, params.flat_logprobs = True, False
        return params

    def _to_batch(self, outputs: list[RequestOutput], n: int, reported: int) -> DataProto:
        for answer in (answer for output in outputs for answer in output.outputs):
            pairs = zip(answer.token_ids, answer.logprobs, strict=True)
            answer.logprobs = ChosenLogProbs([entry[token].logprob for token, entry in pairs])
        return super()._to_batch(outputs, n, reported)
