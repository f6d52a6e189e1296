"""The driver's handle on the student: the policy, the engine that generates from it, and the frozen reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from verl.batch import (
    ANCHOR_COEF,
    GROUP_KEYS,
    PAIR_REFERENCE_KEYS,
    POLICY_KEYS,
    PROMPT_KEYS,
    STUDENT_KEYS,
    TEACHER_KEYS,
    Answers,
    EngineCorrection,
    LogProbs,
    PairLogProbs,
    Prompts,
    ReferenceLogProbs,
    Rewards,
    columns,
    table,
)
from verl.config import SamplingConfig, SodaConfig
from verl.config.run import Config
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.core_algos import closing_eos
from verl.trainer.ppo.engine import Engine, SharedEngine
from verl.trainer.ppo.metric_utils import compute_sync_metrics
from verl.trainer.ppo.shares import Shares
from verl.utils.torch_functional import masked_mean

logger = logging.getLogger(__name__)


class Student:
    """What a stage asks of the student. The only object that tracks whether the engine has the policy's weights.

    Args:
        config: the run's.
        workers: a group of `ActorRolloutRefWorker`.
        tokenizer: the student's.
        eos_token_ids: what may end an answer.
        engine: writes the answers; None: the workers' own does.
    """

    def __init__(
        self,
        config: Config,
        workers: WorkerGroup,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: tuple[int, ...],
        engine: Engine | None = None,
    ):
        self.config = config.actor_rollout_ref
        self.workers = workers
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.shares = Shares(
            config.actor_shares, config.trainer.balance_batch, config.actor_rollout_ref.actor.ppo_mini_batch_size
        )
        self.engine = engine or SharedEngine(workers, self.config.rollout.drops_weights)
        # How often the weights have changed.
        self.changes = 0
        self._engine_is_current = False

    # ------------------------------------------------------------ the engine

    def push_weights(self) -> None:
        """Bring the engine to the policy's present weights, unless it has them."""
        if not self._engine_is_current:
            self.engine.push()
            self._engine_is_current = True

    def weights_changed(self) -> None:
        """Note that the engine does not have the policy's weights any more."""
        self.changes += 1
        self._engine_is_current = False

    def answer(self, prompts: Prompts, step: int, report_all: bool = False) -> Answers:
        """Answers to train on, drawn from the present weights; the step is part of the draw's seed. The engine reports
        its log-probs of some, or of all."""
        rollout = self.config.rollout
        reported = len(prompts) if report_all else rollout.sync_check_prompts
        return self.sample(table(prompts), rollout.sampling, rollout.seed + step, reported)

    def sample(self, prompts: DataProto, sampling: SamplingConfig, seed: int, report_log_probs: int = 0) -> Answers:
        """Answers to a table's prompts from the present weights, with the engine's log-probs of those to the first
        `report_log_probs` prompts."""
        self.push_weights()
        answers = Answers.of(self.engine.generate(to_answer(prompts, sampling, seed, report_log_probs)))
        self._engine_is_current = not self.engine.drops_weights
        return answers

    def texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Texts of (B, N, T) tokens, row after row, without special tokens and the EOS that closes them."""
        mask = mask.bool() & ~closing_eos(ids, mask, self.eos_token_ids)
        rows = zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)
        return self.tokenizer.batch_decode([row[real].tolist() for row, real in rows], skip_special_tokens=True)

    # ------------------------------------------------------------ log-probs

    def log_probs(self, prompts: Prompts, answers: Answers) -> LogProbs:
        """Of the answers, under the present policy."""
        made = self.shares.call(self.workers.compute_log_prob, table(prompts, answers), PROMPT_KEYS + STUDENT_KEYS)
        return LogProbs.of(made)

    def reference_log_probs(self, prompts: Prompts, answers: Answers) -> ReferenceLogProbs:
        """Of the answers, under the frozen reference."""
        made = self.shares.call(self.workers.compute_ref_log_prob, table(prompts, answers), PROMPT_KEYS + STUDENT_KEYS)
        return ReferenceLogProbs.of(made)

    def pair_reference_log_probs(self, prompts: Prompts, answers: Answers) -> PairLogProbs:
        """Of the teacher's answers and the student's, under the frozen reference."""
        return PairLogProbs.of(self.workers.compute_pair_ref_log_prob(columns(table(prompts, answers), GROUP_KEYS)))

    def teacher_log_probs(self, prompts: Prompts) -> torch.Tensor:
        """(B, T) of the teacher's answers, under the present policy at temperature 1."""
        rows = columns(table(prompts), PROMPT_KEYS + TEACHER_KEYS)
        return self.workers.compute_teacher_log_prob(rows).batch["teacher_log_probs"]

    def check_sync(self, prompts: Prompts, answers: Answers, log_probs: LogProbs | None, step: int) -> dict[str, float]:
        """Compare the engine's log-probs with the trainer's where the engine reported them; warn if they part.

        Returns:
            the gap and, if all answers have log-probs already, their entropy: that of the few which the engine
            reports moves with what they are about.
        """
        metrics = {} if log_probs is None else mean_entropy(table(answers, log_probs))
        reported = table(prompts, answers, log_probs).select_idxs(answers.rollout_log_probs_mask.bool())
        if len(reported) == 0:
            return metrics
        if log_probs is None:
            reported.union(self.workers.compute_log_prob(columns(reported, PROMPT_KEYS + STUDENT_KEYS)))
        gap = compute_sync_metrics(reported)
        tolerance = self.config.rollout.sync_check_tolerance
        if gap["training/rollout_probs_diff_mean"] > tolerance:
            logger.warning(
                "step %d: the engine's token probabilities differ from the trainer's by %.4f on average (tolerance "
                "%.4f): the engine does not run on the trained weights, or computes something else with them",
                step, gap["training/rollout_probs_diff_mean"], tolerance,
            )  # fmt: skip
        return metrics | gap

    # ------------------------------------------------------------ learning

    def imitate(self, prompts: Prompts) -> dict[str, float]:
        """One update on the teacher's answers; returns its metrics."""
        return self._update(table(prompts), PROMPT_KEYS + TEACHER_KEYS, **{ANCHOR_COEF: 0.0})

    def learn(
        self,
        prompts: Prompts,
        answers: Answers,
        rewards: Rewards,
        old: LogProbs | None,
        reference: ReferenceLogProbs | None,
        correction: EngineCorrection | None,
        sft_anchor_coef: float,
    ) -> dict[str, float]:
        """One update on the student's answers and, by `sft_anchor_coef`, the teacher's; returns its metrics."""
        keys = PROMPT_KEYS + STUDENT_KEYS + POLICY_KEYS + (TEACHER_KEYS if sft_anchor_coef > 0 else ())
        rows = table(prompts, answers, rewards, old, reference, correction)
        return self._update(rows, keys, **{ANCHOR_COEF: sft_anchor_coef})

    def learn_from_pairs(
        self, prompts: Prompts, rejected: Answers, reference: PairLogProbs, soda: SodaConfig
    ) -> dict[str, float]:
        """One update that prefers the teacher's answers to the student's; returns its metrics."""
        self.weights_changed()
        rows = table(prompts, rejected, reference)
        keys = GROUP_KEYS + PAIR_REFERENCE_KEYS
        return self.shares.call(self.workers.update_actor_on_pairs, rows, keys, soda=soda)[0]

    def _update(self, rows: DataProto, keys: Sequence[str], **meta: float) -> dict[str, float]:
        self.weights_changed()
        return self.shares.call(self.workers.update_actor, rows, keys, **meta)[0]

    # ------------------------------------------------------------ memory

    def peak_memory(self) -> dict[str, float]:
        """The most that any rank's GPU held since the last call; empty on CPU."""
        reports = self.workers.peak_memory()
        return {name: max(report[name] for report in reports) for name in reports[0]}


def to_answer(prompts: DataProto, sampling: SamplingConfig, seed: int, report_log_probs: int, **more: int) -> DataProto:
    """What an engine's ranks are sent of a table's prompts; `more` are further arguments of `BaseRollout.generate`."""
    rows = columns(prompts, PROMPT_KEYS)
    rows.meta_info = {"sampling": sampling, "seed": seed, "report_log_probs": report_log_probs, **more}
    return rows


def mean_entropy(answered: DataProto) -> dict[str, float]:
    """`actor/entropy`, over all tokens of answers that have `entropys`."""
    mean = masked_mean(answered.batch["entropys"], answered.batch["response_mask"])
    return {"actor/entropy": mean.item()}
