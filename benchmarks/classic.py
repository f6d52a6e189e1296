"""The classic way of doing what the trainer does, built beside it from the trainer's own parts, to compare with.

Rows are padded to the longest there can be, the whole vocabulary's logits are materialised for every position, and the
discriminator meets the teacher's answer once for every student's answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from verl.config import SamplingConfig
from verl.models import sharding
from verl.models.answer_models import PolicyModel
from verl.models.packing import AnswerRows
from verl.protocol import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import Config
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker
from verl.workers.rollout import ROLLOUTS
from verl.workers.rollout.hf_rollout import HFRollout


class ClassicPolicyModel(PolicyModel):
    """Full logits in the model's type, then log-probs and entropies of an fp32 copy of the answers' part."""

    def forward(
        self, rows: AnswerRows, temperature: float | torch.Tensor = 1.0, entropy: str = "none"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `PolicyModel.forward` returns."""
        device = next(self.parameters()).device
        mask = torch.cat([rows.prompt_mask, rows.response_mask], dim=-1).long().to(device)
        logits = self.hf(
            input_ids=torch.cat([rows.prompts, rows.responses], dim=-1).to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
        answers = rows.responses.shape[1]
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[:, None, None]
        logits = logits[:, -answers - 1 : -1].float() / temperature
        real = mask[:, -answers:]
        log_probs = logprobs_from_logits(logits, rows.responses.to(device)) * real
        if entropy == "none":
            return log_probs, None
        return log_probs, entropy_from_logits(logits if entropy == "grad" else logits.detach()) * real


@contextmanager
def classic_models() -> Iterator[None]:
    """Policies that are built inside are classic ones."""
    with patch.dict(sharding.ANSWER_MODELS, policy=ClassicPolicyModel):
        yield


def as_pairs(groups: DataProto) -> DataProto:
    """B groups of N student answers as B*N groups of one: the teacher's answer stands beside each of them."""
    answers = groups.batch["responses"].shape[1]
    columns = {
        name: value.flatten(0, 1).unsqueeze(1) if value.dim() == 3 else value.repeat_interleave(answers, dim=0)
        for name, value in groups.batch.items()
    }
    return DataProto.from_dict(columns, meta_info=groups.meta_info)


class ClassicActorWorker(ActorRolloutRefWorker):
    """The actor's worker with classic policies."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """As the trainer's own."""
        with classic_models():
            super().init_model()


class ClassicCriticWorker(CriticWorker):
    """The discriminator's worker on pairs of one student and one teacher."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_scores(self, data: DataProto) -> DataProto:
        """Scores as the trainer's own gives them; the teacher's are computed n times over."""
        groups, answers = data.batch["responses"].shape[:2]
        scores = super().compute_scores(as_pairs(data)).batch
        grouped = {name: values.view(groups, answers) for name, values in scores.items()}
        return DataProto.from_dict({n: v[:, :1] if n.startswith("teacher") else v for n, v in grouped.items()})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def update_critic(self, data: DataProto) -> dict[str, float]:
        """Train on the pairs."""
        return super().update_critic(as_pairs(data))


class ClassicHFRollout(HFRollout):
    """Reports the log-probs of all answers and writes them out as text, for smoke tests on CPU."""

    def _generate(
        self, prompts: DataProto, sampling: SamplingConfig, seed: int, reported: int, longest: int
    ) -> DataProto:
        """As the trainer's own."""
        answers = super()._generate(prompts, sampling, seed, len(prompts), longest)
        self.tokenizer.batch_decode(answers.batch["responses"].flatten(0, 1))
        return answers


@contextmanager
def classic_step() -> Iterator[None]:
    """Steps inside take old log-probs in a pass of their own, and engines report and detokenise everything."""
    rollouts = {"hf": f"{__name__}.ClassicHFRollout", "vllm": "benchmarks.classic_vllm.ClassicVLLMRollout"}
    with patch.dict(ROLLOUTS, rollouts), patch.object(Config, "needs_old_log_probs", True):
        yield
