"""One fixed batch, model and configuration for the update tests; imported by their child processes too."""

from __future__ import annotations

import torch

from tests.tiny import answer_rows, causal_lm, scorer
from verl.batch import ANCHOR_COEF, PROMPT_KEYS, STUDENT_KEYS, TEACHER_KEYS, teacher_response_mask
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.protocol import DataProto
from verl.trainer.config import Config, compose_config
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.pairs import PairPolicy
from verl.workers.critic.dp_critic import DataParallelPPOCritic

PROMPTS, ANSWERS = 4, 3
EOS = 1
# A mini-batch is the whole batch; the learning rate is 0, so gradients can be read after an update.
BASE = [
    "data.train_files=x",
    "actor_rollout_ref.model.path=x",
    "trainer.experiment_name=x",
    # Types and engines as on a machine without a GPU, also where there is one: a test says where its modules are.
    "trainer.device=cpu",
    f"data.train_batch_size={PROMPTS}",
    "data.max_prompt_length=9",
    "data.max_response_length=8",
    "actor_rollout_ref.rollout.temperature=0.7",
    "actor_rollout_ref.actor.optim.lr=0",
    "critic.optim.lr=0",
    # No clipping: it would scale all gradients alike and hide a wrong scale.
    "actor_rollout_ref.actor.grad_clip=1e9",
    "critic.grad_clip=1e9",
]
LOSSES = {
    "sft": ["stage=seqkd"],
    "sft-seq": ["stage=seqkd", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
    "gspo": ["stage=gad", "actor_rollout_ref.actor.entropy_coeff=0.01", "actor_rollout_ref.actor.kl_loss_coef=0.1"],
    "ppo": [
        "stage=gad",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
        "actor_rollout_ref.actor.kl_loss_type=abs",
        "actor_rollout_ref.actor.kl_loss_coef=0.1",
    ],
    "ppo-sum-norm": [
        "stage=gad",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
    ],
    # The policy's own log-probs, detached, in the place of those before the update.
    "ppo-first-look": ["stage=gad", "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"],
    # Drawn by an engine that computes something else: WEIGHTS.
    "gspo-weighted": ["stage=gad", "actor_rollout_ref.actor.kl_loss_coef=0.1"],
    "ppo-weighted-anchor": ["stage=gad", "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"],
    # With the teacher's answers beside, at a weight of ANCHOR.
    "gspo-anchor": ["stage=gad", "actor_rollout_ref.actor.kl_loss_coef=0.1"],
    "ppo-anchor-first-look": [
        "stage=gad",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
    ],
    "soda": ["stage=soda", "soda.sft_coef=0.3"],
    "soda-per-token": ["stage=soda", "soda.length_normalized=True", "soda.beta=2"],
    "ranking": ["stage=gad", "critic.discriminator.loss=ranking"],
    "two_sided_hinge": ["stage=gad", "critic.discriminator.loss=two_sided_hinge"],
    "bradley_terry": ["stage=gad", "critic.discriminator.loss=bradley_terry"],
    "hinge-adaptive": [
        "stage=gad",
        "critic.discriminator.loss=hinge",
        "critic.discriminator.adaptive_temperature.enable=True",
    ],
}
ANCHOR = 0.3
WEIGHTS = torch.linspace(0.25, 2, PROMPTS * ANSWERS * 8).view(PROMPTS, ANSWERS, 8)
CRITIC_LOSSES = [name for name, overrides in LOSSES.items() if any("critic.discriminator" in o for o in overrides)]
# Ways to cut the same mini-batch: everything at once, by tokens, by rows, and padded instead of packed.
SPLITS = {
    "whole": [],
    "tokens": ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20", "critic.ppo_max_token_len_per_gpu=20"],
    "rows": [
        "actor_rollout_ref.actor.use_dynamic_bsz=False",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "critic.ppo_micro_batch_size_per_gpu=3",
    ],
    "padded": ["actor_rollout_ref.model.use_remove_padding=False", "critic.model.use_remove_padding=False"],
}


def settings(loss: str, split: str = "whole", overrides: list[str] | None = None) -> Config:
    """The configuration of one loss, cut in one way."""
    return compose_config([*LOSSES[loss], *BASE, *SPLITS[split], *(overrides or [])])


def batch() -> DataProto:
    """Four prompts of different lengths, three answers each, with old and reference log-probs near the policy's."""
    prompt_lengths = [5, 1, 9, 3]
    students = answer_rows([n for n in prompt_lengths for _ in range(ANSWERS)], [8, 1, 3, 2, 7, 4, 5, 5, 1, 6, 2, 8])
    teachers = answer_rows(prompt_lengths, [3, 8, 2, 6], answer_width=8)
    shape = (PROMPTS, ANSWERS, 8)
    responses = students.responses.view(shape).clone()
    # Some answers end with EOS, some are cut; so is the last teacher's.
    responses[0, 0, -1] = responses[3, 2, -1] = EOS
    for row, length in enumerate([3, 8, 2]):
        teachers.responses[row, length - 1] = EOS
    # Two students of the third prompt wrote the same, and one of the last prompt wrote what the teacher wrote.
    lengths = students.response_mask.sum(-1).view(PROMPTS, ANSWERS)
    assert lengths[2].tolist() == [5, 5, 1] and lengths[3, 0] == teachers.response_mask[3].sum() == 6, lengths
    responses[2, 1] = responses[2, 0]
    responses[3, 0] = teachers.responses[3]
    generator = torch.Generator().manual_seed(3)
    prompts, prompt_mask = teachers.prompts, teachers.prompt_mask
    policy = PolicyModel(causal_lm())
    rows = students.__class__(
        prompts.repeat_interleave(ANSWERS, 0),
        prompt_mask.repeat_interleave(ANSWERS, 0),
        responses.flatten(0, 1),
        students.response_mask,
    )
    with torch.no_grad():
        log_probs = policy(rows, temperature=0.7)[0].view(shape)
    noise = [0.3 * torch.randn(shape, generator=generator) for _ in range(2)]
    return DataProto.from_dict(
        {
            "input_ids": prompts,
            "attention_mask": prompt_mask,
            "teacher_response": teachers.responses,
            "teacher_attention_mask": torch.cat([prompt_mask, teachers.response_mask], -1),
            "responses": responses,
            "response_mask": students.response_mask.view(shape),
            "old_log_probs": log_probs + noise[0],
            "ref_log_prob": log_probs + noise[1],
            "rollout_is_weights": WEIGHTS.clone(),
            "advantages": torch.randn((PROMPTS, ANSWERS, 1), generator=generator).expand(shape).contiguous(),
        }
    )


def update(loss: str, config: Config, data: DataProto, wrap=lambda module: module):
    """Run one update; returns the module with its gradients, and the metrics."""
    if loss in CRITIC_LOSSES:
        data.meta_info["mini_batches"] = 1
        module = wrap(ScoreModel(scorer(), config.critic.model.use_remove_padding))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
        return module, DataParallelPPOCritic(config.critic, module, optimizer, EOS).update_critic(data)
    if loss.endswith("first-look"):
        data.batch.pop("old_log_probs")
    if "weighted" not in loss:
        data.batch.pop("rollout_is_weights", None)
    if "anchor" in loss:
        data.meta_info[ANCHOR_COEF] = ANCHOR
    group = config.actor_rollout_ref
    module = wrap(PolicyModel(causal_lm(), group.model.use_remove_padding))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    actor = DataParallelPPOActor(group.actor, group.rollout, module, optimizer)
    if config.soda.enable:
        return module, PairPolicy(actor).update(pairs_of(data), config.soda)
    return module, actor.update_policy(data)


def pairs_of(data: DataProto) -> DataProto:
    """One answer of each prompt's three, the last prompt's the teacher's own, with reference log-probs of either side
    by the number of its tokens: their differences from the policy's are of different sizes."""
    chosen = teacher_response_mask(data).sum(-1)
    answers = {key: data.batch[key][:, :1] for key in STUDENT_KEYS}
    references = {
        "chosen_ref_log_prob": -4.0 * chosen,
        "rejected_ref_log_prob": -3.5 * answers["response_mask"][:, 0].sum(-1),
    }
    keys = PROMPT_KEYS + TEACHER_KEYS
    return DataProto.from_dict({**{key: data.batch[key] for key in keys}, **answers, **references})
