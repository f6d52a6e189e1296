"""Hugging Face generation on the rank's own, unsharded copy of the model: for CPU runs and for debugging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from verl.config import SamplingConfig
from verl.models.answer_models import plain_attention
from verl.models.attention import set_attention
from verl.models.loading import empty_model, persistent_buffers
from verl.protocol import DataProto
from verl.utils.torch_functional import get_response_mask
from verl.workers.rollout.base import BaseRollout


class LogProbRecorder(LogitsProcessor, StoppingCriteria):
    """The log-prob of every token that `generate` picks for its first `rows` rows.

    As a logits processor it sees the distribution before a token is drawn, as a stopping criterion the token after.
    """

    def __init__(self, rows: int, temperature: float):
        self.rows = rows
        self.temperature = temperature
        self.columns: list[torch.Tensor] = []
        self._distribution: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As processor: scores (rows, V) belong to the next token. As criterion: the token is the last one."""
        if self._distribution is None:
            self._distribution = (scores[: self.rows].float() / self.temperature).log_softmax(-1)
            return scores
        token = input_ids[: self.rows, -1:]
        self.columns.append(self._distribution.gather(-1, token))
        self._distribution = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def log_probs(self) -> torch.Tensor:
        """(rows, tokens generated)."""
        return torch.cat(self.columns, dim=-1)


class HFRollout(BaseRollout):
    """`transformers`' own batched generation with a KV cache; a row stops at an EOS."""

    def _build(self, model_config: PretrainedConfig, device: str, trust_remote_code: bool) -> None:
        self.device = device
        dtype = getattr(torch, self.config.dtype)
        model = empty_model(model_config, "policy", trust_remote_code, dtype).to(device)
        set_attention(model, plain_attention(model))
        self.model = model.eval()

    def _generate(
        self, prompts: DataProto, sampling: SamplingConfig, seed: int, reported: int, longest: int
    ) -> DataProto:
        torch.manual_seed(seed)
        size = max(1, self.config.max_num_seqs // sampling.n)
        config, parts = self._generation_config(sampling, longest), []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size].batch
            of_part = min(max(reported - start, 0), len(part))
            parts.append(self._generate_part(part["input_ids"], part["attention_mask"], config, sampling, of_part))
        return DataProto.concat(parts)

    @torch.inference_mode()
    def _generate_part(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        config: GenerationConfig,
        sampling: SamplingConfig,
        reported: int,
    ) -> DataProto:
        width = int(mask.sum(-1).max())
        count, limit = ids.shape[0], self.config.response_length
        recorder = LogProbRecorder(reported * sampling.n, sampling.temperature if sampling.do_sample else 1.0)
        hooks = {}
        if reported:
            hooks = {
                "logits_processor": LogitsProcessorList([recorder]),
                "stopping_criteria": StoppingCriteriaList([recorder]),
            }
        with _explain_non_finite():
            output = self.model.generate(
                input_ids=ids[:, -width:].to(self.device),
                attention_mask=mask[:, -width:].to(self.device),
                generation_config=config,
                **hooks,
            )
        answers = output[:, width:].clone().cpu()
        generated = answers.shape[1]

        pad = self.tokenizer.pad_token_id
        response_mask = answers.new_zeros(count * sampling.n, limit)
        response_mask[:, :generated] = get_response_mask(answers, self.eos_token_ids)
        responses = torch.full_like(response_mask, pad)
        responses[:, :generated] = answers
        responses = responses.masked_fill(response_mask == 0, pad)
        log_probs = torch.zeros(responses.shape)
        if reported:
            log_probs[: reported * sampling.n, :generated] = recorder.log_probs().cpu()
        grouped = (count, sampling.n, limit)
        return DataProto.from_dict(
            {
                "responses": responses.view(grouped),
                "response_mask": response_mask.view(grouped),
                "rollout_log_probs": (log_probs * response_mask).view(grouped),
                "rollout_log_probs_mask": (torch.arange(count) < reported).long(),
            }
        )

    def _generation_config(self, sampling: SamplingConfig, longest: int) -> GenerationConfig:
        draw = {"do_sample": False}
        if sampling.do_sample:
            top_k = sampling.top_k if sampling.top_k > 0 else 0
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
        return GenerationConfig(
            max_new_tokens=longest,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            num_return_sequences=sampling.n,
            **draw,
        )

    def push_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """ValueError unless exactly the model's parameters and persistent buffers arrive."""
        missing = dict(self.model.named_parameters()) | dict(persistent_buffers(self.model))
        for name, tensor in weights:
            if name not in missing:
                raise ValueError(f"pushed weight {name!r} is not a parameter of the rollout model, or came twice")
            missing.pop(name).data.copy_(tensor)
        if missing:
            raise ValueError(f"{len(missing)} weights were not pushed, e.g. {sorted(missing)[:3]}")

    def sleep(self) -> None:
        """Nothing to give up: the copy of the model is all there is."""

    def wake(self) -> None:
        """Do nothing: the engine keeps its memory."""


@contextmanager
def _explain_non_finite() -> Iterator[None]:
    """What torch says when it cannot draw a token becomes a FloatingPointError about the student."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise FloatingPointError(
            "the student cannot answer, its probabilities of the next token are not finite: its weights diverged, or "
            "held inf or nan from the start (actor_rollout_ref.model.path). Lower actor_rollout_ref.actor.optim.lr and "
            "go on from a checkpoint before that (trainer.resume_mode=resume_path), or begin afresh "
            "(trainer.resume_mode=disable)"
        ) from error
