"""Runs that went wrong, rebuilt as series from the figures that were kept of them, and what is wrong with each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

Rows = list[tuple[int, dict[str, float]]]


def healthy_step(step: int, draw: random.Random, frozen: int = 0) -> dict[str, float]:
    """A step of GAD as it should be; in the first `frozen` ones the actor is not trained."""
    metrics = {
        "critic/d_acc": draw.gauss(0.68, 0.04),
        "critic/score_diff": draw.gauss(0.25, 0.05),
        "critic/ranking_loss": draw.gauss(0.66, 0.01),
        "critic/d_loss": draw.gauss(1.0, 0.03),
        "critic/score_reg": draw.gauss(1.5, 0.2),
        "critic/diff_penalty": abs(draw.gauss(0.01, 0.01)),
        "critic/grad_norm": abs(draw.gauss(1.0, 0.3)),
        "critic/length_reward_corr": draw.gauss(0.0, 0.1),
        "critic/length_ratio": draw.gauss(1.0, 0.03),
        "critic/zero_std_group_frac": abs(draw.gauss(0.02, 0.02)),
        "critic/advantages/max": draw.gauss(2.3, 0.1),
        "critic/advantages/min": draw.gauss(-2.3, 0.1),
        "response_length/mean": draw.gauss(94, 3),
        "response_length/clip_ratio": abs(draw.gauss(0.02, 0.01)),
        "actor/entropy": draw.gauss(0.6, 0.1),
        "training/rollout_probs_diff_mean": abs(draw.gauss(0.007, 0.001)),
    }
    if step >= frozen:
        metrics |= {
            "actor/pg_loss": draw.gauss(0.01, 0.01),
            "actor/pg_clipfrac": draw.gauss(0.2, 0.03),
            "actor/ppo_kl": draw.gauss(1e-3, 3e-4),
            "actor/kl_divergence": abs(draw.gauss(0.01, 0.003)),
            "actor/grad_norm": abs(draw.gauss(0.3, 0.05)),
        }
    if step % 10 == 0:
        metrics |= {
            "val/critic/d_acc": draw.gauss(0.66, 0.03),
            "val/critic/fixed/d_acc": draw.gauss(0.68, 0.02),
            "val/rouge-L/mean": draw.gauss(0.45, 0.01),
        }
    return metrics


def healthy_rows(steps: int, seed: int, frozen: int = 0) -> Rows:
    draw = random.Random(seed)
    return [(step, healthy_step(step, draw, frozen)) for step in range(steps)]


def share(step: int, begin: int, end: int) -> float:
    """0 before the step `begin`, 1 after `end`, straight between them."""
    return min(1.0, max(0.0, (step - begin) / (end - begin)))


@dataclass(frozen=True)
class BadRun:
    """Rows with the rule that is to be named first, and the setting that is to be turned first."""

    rows: Rows
    rule: str
    knob: str
    settings: dict[str, object] = field(default_factory=dict)
    # Alarms that follow from the first.
    follow: tuple[str, ...] = ()


def changed(steps: int, change: Callable[[int], dict[str, float]], seed: int = 0, frozen: int = 0) -> Rows:
    """A healthy run with other values for some metrics. Held-out accuracy goes with the other, unless it is given."""
    rows = []
    for step, data in healthy_rows(steps, seed, frozen):
        changes = change(step)
        if "critic/d_acc" in changes and "val/critic/d_acc" in data:
            data["val/critic/d_acc"] = data["val/critic/fixed/d_acc"] = changes["critic/d_acc"] - 0.02
        rows.append((step, data | changes))
    return rows


def one_token(step: int) -> dict[str, float]:
    """V1's hinge: the difference of scores to 117, the answers to one token."""
    return {
        "critic/score_diff": min(117.0, 0.2 * math.exp(0.22 * step)),
        "critic/d_acc": 0.65 + 0.35 * share(step, 5, 20),
        "critic/ranking_loss": 0.66 * (1 - share(step, 5, 25)),
        "critic/d_loss": 1.0 * (1 - share(step, 5, 25)),
        "response_length/mean": 94 - 93 * share(step, 10, 30),
        "critic/length_ratio": 1 - 0.99 * share(step, 10, 30),
    }


def never_ending(step: int) -> dict[str, float]:
    return {
        "critic/d_acc": 0.998,
        "response_length/clip_ratio": 1.0,
        "critic/ranking_loss": 0.01,
        "critic/d_loss": 0.02,
    }


def all_alike(step: int) -> dict[str, float]:
    return {
        "critic/zero_std_group_frac": 1.0,
        "critic/advantages/max": 0.0,
        "critic/advantages/min": 0.0,
        "actor/pg_loss": 0.0,
        "actor/grad_norm": 1e-9,
        "actor/pg_clipfrac": 0.0,
    }


def regulariser(step: int) -> dict[str, float]:
    """The first default on answers of 450 tokens; 8 steps of head start."""
    fading = math.exp(-0.05 * step)
    return {
        "critic/d_loss": 710 * fading + 1.04,
        "critic/score_reg": 142000 * fading,
        "critic/grad_norm": 40875 * fading,
        "critic/d_acc": 0.485 + 0.055 * math.sin(step),
        "critic/score_diff": 0.002 * math.sin(step),
        "critic/ranking_loss": 0.693,
    }


def endings(d_acc: float, score_diff: float):
    """The paper's loss without EOS: what has no ending scores best."""

    def change(step: int) -> dict[str, float]:
        return {
            "critic/d_acc": 0.6 + (d_acc - 0.6) * share(step, 0, 8),
            "critic/score_diff": 0.2 + (score_diff - 0.2) * share(step, 0, 30),
            "critic/ranking_loss": 0.66 - 0.5 * share(step, 0, 30),
            "critic/length_reward_corr": 0.6 * share(step, 6, 16),
            "response_length/clip_ratio": 0.30 + 0.17 * share(step, 8, 30),
        }

    return change


def over_fitted(step: int) -> dict[str, float]:
    held_out = {"val/critic/d_acc": 0.458} if step % 10 == 0 else {}
    return {"critic/d_acc": 0.768, **held_out}


LR = {"critic": {"optim": {"lr": 5e-6}}}
UNSEEN_ENDS = {"critic": {"discriminator": {"exclude_eos": True}}, "algorithm": {"cut_answers": "keep"}}
BAD_RUNS = {
    "one token, score_diff 117": BadRun(
        changed(45, one_token),
        "margin_runs_away",
        "critic.discriminator.loss",
        {"critic": {"discriminator": {"loss": "hinge"}}},
        follow=("discriminator_too_strong", "answers_collapse"),
    ),
    "d_acc .998, clip ratio 1.0": BadRun(
        changed(40, never_ending),
        "answers_cut",
        "data.max_response_length",
        {"data": {"max_response_length": 768}},
        follow=("discriminator_too_strong", "ranking_saturated"),
    ),
    "advantages 0": BadRun(
        changed(40, all_alike),
        "answers_alike",
        "actor_rollout_ref.rollout.temperature",
        {"actor_rollout_ref": {"rollout": {"temperature": 0.1, "n": 8}}},
        follow=("no_policy_signal",),
    ),
    "86% cut": BadRun(
        changed(40, lambda step: {"response_length/clip_ratio": 0.86, "critic/length_ratio": 0.7}),
        "answers_cut",
        "data.max_response_length",
    ),
    "held-out .458": BadRun(changed(40, over_fitted), "over_fitted", "trainer.total_epochs"),
    "regulariser of 710": BadRun(
        changed(36, regulariser, frozen=8),
        "regulariser_dominates",
        "critic.discriminator.ranking.reg_on",
        {"critic": {"discriminator": {"ranking": {"reg_on": "raw"}}}},
        follow=("critic_gradient_explodes", "discriminator_blind"),
    ),
    "length is rewarded, endings unseen": BadRun(
        changed(40, endings(d_acc=0.98, score_diff=8), frozen=8),
        "length_rewarded",
        "critic.discriminator.exclude_eos",
        UNSEEN_ENDS,
    ),
    "length is rewarded, accuracy in range": BadRun(
        changed(40, endings(d_acc=0.8, score_diff=0.5), frozen=8), "length_rewarded", "algorithm.length_correction"
    ),
    # Neighbours of those.
    "too strong": BadRun(
        changed(40, lambda step: {"critic/d_acc": 0.6 + 0.38 * share(step, 0, 8)}),
        "discriminator_too_strong",
        "critic.optim.lr",
        LR,
    ),
    "outrun": BadRun(
        changed(40, lambda step: {"critic/d_acc": 0.6 - 0.4 * share(step, 0, 8), "critic/score_diff": -0.3}),
        "discriminator_blind",
        "actor_rollout_ref.actor.optim.lr",
    ),
    "teacher's text missing": BadRun(
        changed(
            40,
            lambda step: {"critic/d_acc": 0.0, "critic/score_diff": 0.0, "critic/ranking_loss": 0.693},
        ),
        "discriminator_blind",
        "data.response_key",
    ),
    "nan": BadRun(
        changed(40, lambda step: {"actor/grad_norm": math.nan if step > 10 else 0.3}),
        "not_finite",
        "actor_rollout_ref.actor.optim.lr",
    ),
    "clip range of 4e-4": BadRun(
        changed(40, lambda step: {"actor/pg_clipfrac": 0.63}),
        "clip_fraction_high",
        "actor_rollout_ref.actor.clip_ratio_high",
        {"actor_rollout_ref": {"actor": {"clip_ratio_high": 4e-4}}},
    ),
    "wrong weights in the engine": BadRun(
        changed(40, lambda step: {"training/rollout_probs_diff_mean": 0.2}),
        "engine_out_of_sync",
        "actor_rollout_ref.rollout.free_cache_engine",
    ),
    "over-confident": BadRun(
        changed(40, lambda step: {"critic/diff_penalty": 0.3}), "over_confident", "critic.optim.lr"
    ),
    "entropy gone": BadRun(
        changed(40, lambda step: {"actor/entropy": 0.6 - 0.55 * share(step, 10, 16)}),
        "policy_entropy_gone",
        "actor_rollout_ref.actor.optim.lr",
    ),
    "runs to the limit": BadRun(
        changed(40, lambda step: {"response_length/clip_ratio": 0.05 + 0.9 * share(step, 5, 20)}),
        "answers_run_to_limit",
        "algorithm.cut_answers",
        {"algorithm": {"cut_answers": "keep"}},
        follow=("answers_cut",),
    ),
    "rewards short answers": BadRun(
        changed(
            40,
            lambda step: {
                "critic/length_reward_corr": -0.5 * share(step, 0, 8),
                "critic/length_ratio": 1 - 0.9 * share(step, 8, 20),
            },
        ),
        "length_rewarded",
        "algorithm.length_correction",
        follow=("answers_collapse",),
    ),
}
