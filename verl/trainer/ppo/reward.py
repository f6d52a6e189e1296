"""Rewards on the answers: the discriminator's score, a task reward of the user's own, and the KL penalty."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import numpy as np
import torch

from verl.batch import Answers, LogProbs, Prompts, ReferenceLogProbs, Rewards, table
from verl.config.run import AlgorithmConfig, Config
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import (
    AdaptiveKLController,
    FixedKLController,
    get_adv_estimator_fn,
)
from verl.trainer.ppo.core_algos import kl_penalty as estimate_kl
from verl.trainer.ppo.discriminator_algos import ends_with_eos
from verl.trainer.ppo.metric_utils import correlation, mean_max_min
from verl.trainer.ppo.reward_shaping import flat_groups, settle_cut_answers, without_length
from verl.utils.stalls import waiting
from verl.utils.user_code import cannot_end_the_run, load_user_function

logger = logging.getLogger(__name__)


class TaskReward:
    """A function of the user's: `fn(prompt, answer, teacher) -> number`.

    `prompt` is the list of chat messages, a system message from a column of its own among them; `answer` and `teacher`
    are texts.

    Raises:
        ValueError: `name` (path/to/file.py:function) cannot be loaded.
    """

    def __init__(self, name: str):
        self.name = name
        self.fn = load_user_function(name)

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[str], teachers: Sequence[str], rows: Sequence[int]
    ) -> torch.Tensor:
        """Rewards (B, N) of `answers`, the N to each prompt next to each other.

        Args:
            rows: number of each prompt's row in the data, for messages.

        Raises:
            RuntimeError: the function raised; it is the cause.
            TypeError, ValueError: what it returned is not one finite number that fp32 has.
        """
        per_prompt = len(answers) // len(prompts)
        rewards = torch.zeros(len(prompts), per_prompt)
        for i, answer in enumerate(answers):
            row, number = divmod(i, per_prompt)
            where = f"custom_reward_function {self.name}, data row {rows[row]}, answer {number}"
            try:
                # A copy: the messages are the data's own, and the next answer's reward gets them too.
                with cannot_end_the_run("it"), waiting(f"{where}: has not returned"):
                    value = self.fn(deepcopy(prompts[row]), answer, teachers[row])
            except Exception as error:
                raise RuntimeError(f"{where}: raised {type(error).__name__}: {error}") from error
            rewards[row, number] = _as_number(value, where)
        return rewards


def _as_number(value: Any, where: str) -> float:
    is_scalar = isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.shape == ()
    if not is_scalar and (not isinstance(value, int | float)):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise TypeError(f"{where}: expected one number, got {type(value).__name__}{shape}: {value!r:.200}")
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected a number that fp32 has, got {value!r:.60}: {error}") from error
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {number}")
    if abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: expected a number that fp32 has, got {number}")
    return number


def get_custom_reward_fn(config: Config) -> TaskReward | None:
    """The task reward that `custom_reward_function` names, or None."""
    custom = config.custom_reward_function
    return None if custom.path is None else TaskReward(f"{custom.path}:{custom.name}")


def score_task(task: TaskReward, prompts: Prompts, texts: Sequence[str]) -> torch.Tensor:
    """The user's reward of every answer, (B, N); `texts` are the answers', row after row."""
    return task(prompts.raw_prompt, texts, prompts.teacher_text, prompts.index)


def apply_kl_penalty(
    data: DataProto,
    kl_ctrl: FixedKLController | AdaptiveKLController,
    kl_penalty: str = "kl",
    adapts: bool = True,
) -> tuple[DataProto, dict[str, float]]:
    """Make `token_level_rewards` from `token_level_scores` less the controller's share of the KL to the reference.

    With `adapts` the controller then adapts to the mean KL per token of this batch's answers: not while the actor is
    frozen, whose KL of 0 says nothing about the coefficient. All tensors (B, N, T).
    """
    mask = data.batch["response_mask"]
    kl = estimate_kl(data.batch["old_log_probs"], data.batch["ref_log_prob"], kl_penalty) * mask
    coefficient = kl_ctrl.value
    data.batch["token_level_rewards"] = data.batch["token_level_scores"] - coefficient * kl
    current = (kl.sum(-1) / mask.sum(-1).clamp(min=1)).mean().item()
    if adapts:
        kl_ctrl.update(current_kl=current, n_steps=mask[..., 0].numel())
    return data, {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": coefficient}


def reward_answers(
    answers: Answers,
    scores: torch.Tensor,
    algorithm: AlgorithmConfig,
    kl_ctrl: FixedKLController | AdaptiveKLController,
    task: torch.Tensor | None,
    eos_token_id: int | Sequence[int],
    old: LogProbs | None = None,
    reference: ReferenceLogProbs | None = None,
    kl_adapts: bool = True,
) -> tuple[Rewards, dict[str, float]]:
    """From the discriminator's scores of the answers (B, N) to their advantages.

    In this order: the task reward (`task`, (B, N)) is added, the part that goes with length is taken out, what cut
    answers are worth is settled, groups that say nothing are left out, the KL penalty is taken off, advantages follow.

    Args:
        old, reference: where the KL penalty is part of the reward.

    Returns:
        the rewards, and how much each of it did.
    """
    metrics: dict[str, float] = {}
    mask, rewards = answers.response_mask, scores
    if task is not None:
        metrics |= mean_max_min("critic/task_reward", task)
        rewards = rewards + algorithm.task_reward_weight * task
    cut = ~ends_with_eos(answers.responses, mask, eos_token_id)
    lengths = mask.sum(-1)
    if algorithm.length_correction:
        counted = ~cut if algorithm.cut_answers != "keep" else torch.ones_like(cut)
        rewards, slope = without_length(rewards, lengths, counted)
        metrics["critic/length_slope"] = slope.item()
    rewards, left_out = settle_cut_answers(rewards, cut, algorithm.cut_answers)
    flat = flat_groups(rewards, left_out, algorithm.min_group_std)
    left_out = left_out | flat
    made = table(answers, old, reference)
    made.batch["token_level_scores"] = made.batch["token_level_rewards"] = on_last_token(rewards, mask)
    if algorithm.use_kl_in_reward:
        metrics |= apply_kl_penalty(made, kl_ctrl, algorithm.kl_penalty, kl_adapts)[1]
    std = algorithm.norm_adv_by_std_in_grpo
    compute_advantage(made, algorithm.adv_estimator, norm_adv_by_std_in_grpo=std, left_out=left_out)
    compared = ~left_out
    if not compared.any():
        logger.warning(
            "every answer of this step is left out of the comparison (%d of %d were cut, %d of %d groups are flat): "
            "the student learns nothing from it; see algorithm.cut_answers, algorithm.min_group_std and "
            "data.max_response_length", cut.sum(), cut.numel(), flat.sum(), flat.numel(),
        )  # fmt: skip
    metrics |= {
        "response_length/cut_ratio": cut.float().mean().item(),
        "critic/left_out_frac": left_out.float().mean().item(),
        "critic/flat_group_frac": flat.float().mean().item(),
    }
    if compared.any():
        metrics["critic/length_reward_corr_used"] = correlation(lengths[compared].float(), rewards[compared])
    if cut.any():
        metrics["critic/advantages/cut_mean"] = made.batch["advantages"][..., 0][cut].mean().item()
    return Rewards.of(made), metrics


def compute_advantage(
    data: DataProto,
    adv_estimator: str,
    gamma: float = 1.0,
    lam: float = 1.0,
    num_repeat: int | None = None,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgorithmConfig | None = None,
    left_out: torch.Tensor | None = None,
) -> DataProto:
    """Add `advantages` and `returns` (B, N, T); the answers in one row are one group, those `left_out` (B, N) apart:
    each of these is a group of its own, which has no advantage.

    gamma, lam, config: for an estimator of the user's that takes them.

    Raises:
        ValueError: `num_repeat` is given and is not N.
    """
    rewards, mask = data.batch["token_level_rewards"], data.batch["response_mask"]
    if num_repeat not in (None, rewards.shape[1]):
        raise ValueError(f"num_repeat={num_repeat}, but there are {rewards.shape[1]} answers to each prompt")
    estimate = get_adv_estimator_fn(adv_estimator)
    asked = {"gamma": gamma, "lam": lam, "config": config}
    asked = {name: value for name, value in asked.items() if name in signature(estimate).parameters}
    groups = np.repeat(np.arange(len(data)), rewards.shape[1])
    if left_out is not None:
        alone = left_out.flatten().numpy()
        groups[alone] = len(data) + np.arange(alone.sum())
    advantages, returns = estimate(
        token_level_rewards=rewards.flatten(0, 1),
        response_mask=mask.flatten(0, 1),
        index=groups,
        norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo,
        **asked,
    )
    data.batch["advantages"], data.batch["returns"] = advantages.view_as(rewards), returns.view_as(rewards)
    return data


def on_last_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One score per answer (B, N) as token-level scores (B, N, T) under a mask (B, N, T)."""
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.zeros(mask.shape).scatter(-1, last, scores.unsqueeze(-1))
