"""One step of each stage, from prompts to updated weights: SeqKD, warmup and GAD, SODA.

Each line computes one record (`verl/batch.py`) from others. `student.py` and `discriminator.py` call the workers;
`reward.py` turns scores into advantages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from verl.batch import Answers, EngineCorrection, LogProbs, Prompts, Rewards, Scores, table
from verl.config.run import Config
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import AdaptiveKLController, FixedKLController
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.engine_correction import truncated_importance_weights
from verl.trainer.ppo.generation import Generation, Metrics, Timed
from verl.trainer.ppo.head_start import HeadStart
from verl.trainer.ppo.metric_utils import compute_data_metrics, compute_discriminator_metrics
from verl.trainer.ppo.rejected import RejectedAnswers
from verl.trainer.ppo.reward import TaskReward, reward_answers, score_task
from verl.trainer.ppo.student import Student
from verl.utils.rouge import mean_rouge_l


@dataclass(frozen=True)
class Step:
    """What a step made, and the metrics of making it."""

    prompts: Prompts
    metrics: Metrics
    answers: Answers | None = None
    scores: Scores | None = None
    rewards: Rewards | None = None

    def table(self) -> DataProto:
        """Everything that it made, side by side."""
        return table(self.prompts, self.answers, self.scores, self.rewards)


@dataclass(frozen=True)
class Steps:
    """Makes the steps of a run.

    Args:
        discriminator: of warmup and GAD.
        head_start: says when the actor begins to learn.
        rejected: of SODA.
        task_reward: the user's own, if there is one.
        kl_ctrl: the coefficient of the KL penalty in the reward.
        total_steps: of the run.
        generation: where the answers of warmup and GAD come from.
    """

    config: Config
    student: Student
    discriminator: Discriminator | None
    head_start: HeadStart
    rejected: RejectedAnswers | None
    task_reward: TaskReward | None
    kl_ctrl: FixedKLController | AdaptiveKLController
    total_steps: int
    generation: Generation

    def make(self, prompts: Prompts, step: int, samples_seen: int, timed: Timed) -> Step:
        """The stage's own step.

        Args:
            step: its number, the updates before it.
            samples_seen: training rows before these.
            timed: see `Timed`.
        """
        if self.config.soda.enable:
            made = self._soda(prompts, step, samples_seen, timed)
        else:
            made = (self._adversarial if self.config.use_critic else self._sft)(prompts, step, timed)
        metrics = made.metrics | compute_data_metrics(made.table(), use_critic=made.rewards is not None)
        if made.scores is not None:
            metrics |= compute_discriminator_metrics(made.table())
        return replace(made, metrics=metrics)

    def _sft(self, prompts: Prompts, step: int, timed: Timed) -> Step:
        """SeqKD: one update on the teacher's answers. The student's are sampled for monitoring only."""
        student, answers = self.student, None
        metrics = student.shares.unbalance(table(prompts))
        frequency = self.config.sft_sample_freq
        if frequency > 0 and step % frequency == 0:
            with timed("gen"):
                answers = student.answer(prompts, step)
            metrics["train/rouge-L/mean"] = self._sampled_rouge(prompts, answers)
        return Step(prompts, metrics | self._imitate(prompts, answers, step, timed), answers)

    def _adversarial(self, prompts: Prompts, step: int, timed: Timed) -> Step:
        """Warmup and GAD: the student answers, the discriminator scores and learns, then the student learns."""
        student = self.student
        with timed("testing"):
            metrics = self.head_start.check(step)
        answers, generated = self.generation.answers(prompts, step, timed)
        metrics |= generated
        metrics |= student.shares.unbalance(table(prompts, answers))
        scores, judged = self.discriminator.score_and_learn(prompts, answers, step, timed)
        if self.config.use_sft:
            rewards, learned = None, self._imitate(prompts, answers, step, timed)
        else:
            rewards, learned = self._reward_and_learn(prompts, answers, scores, step, timed)
        return Step(prompts, metrics | judged | learned, answers, scores, rewards)

    def _imitate(self, prompts: Prompts, answers: Answers | None, step: int, timed: Timed) -> Metrics:
        """The actor's update on the teacher's answers; the student's, if there are any, show whether the engine has its
        weights."""
        metrics = {}
        if answers is not None:
            with timed("old_log_prob"):
                metrics = self.generation.check_sync(prompts, answers, None, step)
        with timed("update_actor"):
            return metrics | self.student.imitate(prompts)

    def _reward_and_learn(
        self, prompts: Prompts, answers: Answers, scores: Scores, step: int, timed: Timed
    ) -> tuple[Rewards, Metrics]:
        """Log-probs where the reward or the update asks for them, rewards, advantages and, unless the actor is still
        frozen, its update."""
        config, student, old, reference = self.config, self.student, None, None
        trains = self.head_start.actor_trains(step)
        in_reward = config.algorithm.use_kl_in_reward
        with timed("old_log_prob"):
            if in_reward or (trains and config.needs_old_log_probs):
                old = student.log_probs(prompts, answers)
            metrics = self.generation.check_sync(prompts, answers, old, step)
        if in_reward or (trains and config.use_reference):
            with timed("ref"):
                reference = student.reference_log_probs(prompts, answers)
        with timed("adv"):
            task = self._score_task(prompts, answers)
            rewards, rewarded = reward_answers(
                answers, scores.student_scores, config.algorithm, self.kl_ctrl, task, student.eos_token_ids, old,
                reference, kl_adapts=trains,
            )  # fmt: skip
        metrics |= rewarded
        if trains:
            # Omitted where the update's own forward gives the same values, to the last bit.
            old = old if config.needs_old_log_probs else None
            correction, corrected = self._correct_engine(answers, old)
            with timed("update_actor"):
                learned = student.learn(
                    prompts, answers, rewards, old, reference, correction, self._sft_anchor_coef(step)
                )
            metrics |= corrected | learned
        return rewards, metrics

    def _correct_engine(self, answers: Answers, old: LogProbs | None) -> tuple[EngineCorrection | None, Metrics]:
        """If they are asked for, weights for answers that the engine drew with other probabilities than the policy."""
        algorithm = self.config.algorithm
        if algorithm.rollout_is is None:
            return None, {}
        weights, metrics = truncated_importance_weights(
            old.old_log_probs, answers.rollout_log_probs, answers.response_mask, algorithm.rollout_is,
            algorithm.rollout_is_threshold,
        )  # fmt: skip
        return EngineCorrection(weights), metrics

    def _soda(self, prompts: Prompts, step: int, samples_seen: int, timed: Timed) -> Step:
        """SODA: one update on pairs of the teacher's answer and one that the student wrote before."""
        with timed("rejected"):
            rejected, reference, metrics = self.rejected.of(prompts, samples_seen, step)
        metrics |= self.student.shares.unbalance(table(prompts, rejected))
        with timed("update_actor"):
            metrics |= self.student.learn_from_pairs(prompts, rejected, reference, self.config.soda)
        return Step(prompts, metrics, rejected)

    def _score_task(self, prompts: Prompts, answers: Answers) -> torch.Tensor | None:
        if self.task_reward is None:
            return None
        return score_task(self.task_reward, prompts, self.student.texts(answers.responses, answers.response_mask))

    def _sft_anchor_coef(self, step: int) -> float:
        """The weight of the teacher's answers in this step's policy update."""
        actor = self.config.actor_rollout_ref.actor
        start, end = actor.sft_anchor_coef, actor.sft_anchor_end_coef
        done = step / max(1, self.total_steps - 1)
        return start if end is None else start + (end - start) * done

    def _sampled_rouge(self, prompts: Prompts, answers: Answers) -> float:
        texts = self.student.texts(answers.responses, answers.response_mask)
        return mean_rouge_l(texts, prompts.teacher_text.repeat(len(texts) // len(prompts)).tolist())
