"""What the experiment trains: every run, what it starts from, and its settings.

A run is a name; `runs` lists them in an order in which each can be run after those before it. One thing differs at a
time from `GAD`, which has the trainer's defaults but for what a small student and short training ask: learning rates,
batch and length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 64  # prompts per step
N = 8
HEAD_START = 30  # steps of the discriminator alone
GAD_STEPS = 200  # of both, after the head start
ANSWERS = 4  # to each of the judge's prompts, from every student
TEMPERATURES = (0.8, 1.0)  # they are drawn at

COMMON = (
    f"data.train_batch_size={BATCH}",
    "data.filter_overlong_prompts=True",
    "actor_rollout_ref.rollout.temperature=0.8",
    "actor_rollout_ref.rollout.max_num_seqs=512",
    "trainer.logger=[file]",
    "trainer.log_val_generations=0",
    "trainer.save_freq=-1",
)
SEQKD = (
    "stage=seqkd",
    "actor_rollout_ref.actor.optim.lr=2e-4",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=10",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    "trainer.sft_monitor_freq=-1",
    "trainer.best_metric=val/sft_loss",
    "trainer.best_mode=min",
)
GAD = (
    "stage=gad",
    f"trainer.critic_warmup={HEAD_START}",
    f"actor_rollout_ref.rollout.n={N}",
    "actor_rollout_ref.actor.optim.lr=5e-6",
    # At 1e-5 it told nothing apart after 27 steps; at 5e-5 four of five held-out pairs after 30.
    "critic.optim.lr=5e-5",
    "critic.optim.lr_warmup_steps=5",
)
GOING_ON = ("actor_rollout_ref.actor.optim.lr=5e-6", "actor_rollout_ref.actor.optim.lr_scheduler_type=constant")
SODA = ("stage=soda", "actor_rollout_ref.actor.optim.lr=5e-6", "actor_rollout_ref.actor.optim.lr_warmup_steps=10")
BRADLEY_TERRY = ("critic.discriminator.loss=bradley_terry", "critic.discriminator.pooling=mean")
LAST_TOKEN = ("critic.discriminator.loss=bradley_terry", "critic.discriminator.pooling=last_token")
# The form that the default grew out of, on sums over tokens, with nothing beside it that the trainer has learned since.
USERS_FORMULA = (
    "critic.discriminator.loss=ranking",
    "critic.discriminator.pooling=mean",
    "critic.discriminator.ranking.reg_on=raw",
    "critic.discriminator.exclude_eos=True",
    "critic.balance.enable=False",
    "algorithm.cut_answers=keep",
)
PAPERS_LOSS = (
    "critic.discriminator.loss=bradley_terry",
    "critic.discriminator.pooling=last_token",
    "critic.discriminator.exclude_eos=True",
    "critic.balance.enable=False",
    "algorithm.cut_answers=keep",
)


# The student as it is, not sharpened: at .8 it uses fewer different words than its teacher.
WARM = ("actor_rollout_ref.rollout.temperature=1.0",)


@dataclass(frozen=True)
class Run:
    """One training run.

    start: "base", or RUN for the end of another run, or RUN@best for its best checkpoint.
    overrides: settings beyond `COMMON`.
    epochs, steps: how long; one of them is None.
    answer_every: steps, or epochs where `epochs` counts, after which the held-out prompts are answered; at the end too.
    """

    name: str
    start: str
    overrides: tuple[str, ...]
    epochs: int | None = None
    steps: int | None = None
    answer_every: int | None = None

    @property
    def parent(self) -> str | None:
        """The run that must be done before."""
        return None if self.start == "base" else self.start.split("@")[0]


def _gad(name: str, *more: str, start: str = "SeqKD") -> Run:
    return Run(name, start, (*GAD, *more), steps=HEAD_START + GAD_STEPS, answer_every=100)


def _soda(name: str, *more: str, start: str = "SeqKD") -> Run:
    return Run(name, start, (*SODA, *more), epochs=2, answer_every=1)


def runs() -> Iterator[Run]:
    """All of them."""
    yield Run("base", "base", ("stage=seqkd",), steps=0)
    yield Run("SeqKD-2-epochs", "base", SEQKD, epochs=2)
    yield Run("SeqKD", "base", SEQKD, epochs=4)
    yield Run("SeqKD-slow", "base", (*SEQKD, "actor_rollout_ref.actor.optim.lr=1e-4"), epochs=4)
    yield Run("SeqKD-fast", "base", (*SEQKD, "actor_rollout_ref.actor.optim.lr=4e-4"), epochs=4)
    constant = ("actor_rollout_ref.actor.optim.lr_scheduler_type=constant", "actor_rollout_ref.actor.optim.lr=1e-4")
    yield Run("SeqKD-8-epochs", "base", SEQKD, epochs=8)
    yield Run("SeqKD-16-epochs", "base", SEQKD, epochs=16)
    yield Run("SeqKD-constant", "base", (*SEQKD, *constant), epochs=6, answer_every=1)
    yield _gad("GAD-from-2-epochs", start="SeqKD-2-epochs")
    yield _soda("SODA")
    yield _soda("SODA-sft", "soda.sft_coef=1")
    yield _soda("SODA-slow", "actor_rollout_ref.actor.optim.lr=1e-6")
    yield _gad("GAD")
    yield _gad("GAD-users-formula", *USERS_FORMULA)
    yield _gad("GAD-papers-loss", *PAPERS_LOSS)
    yield _gad("GAD-bradley_terry", *BRADLEY_TERRY)
    yield _gad("GAD-last-token", *LAST_TOKEN)
    yield _gad("GAD-last-token-anchor", *LAST_TOKEN, "actor_rollout_ref.actor.sft_anchor_coef=0.3")
    yield _gad("GAD-last-token-fast", *LAST_TOKEN, "actor_rollout_ref.actor.optim.lr=1e-5")
    yield _gad("GAD-last-token-16-answers", *LAST_TOKEN, "actor_rollout_ref.rollout.n=16")
    yield _gad("GAD-last-token-no-std", *LAST_TOKEN, "algorithm.norm_adv_by_std_in_grpo=False")
    yield _gad("GAD-last-token-length-correction", *LAST_TOKEN, "algorithm.length_correction=True")
    yield _gad("GAD-last-token-ranking", "critic.discriminator.pooling=last_token")
    yield _gad("GAD-last-token-warm", *LAST_TOKEN, *WARM)
    yield _gad("GAD-last-token-warm-fast", *LAST_TOKEN, *WARM, "actor_rollout_ref.actor.optim.lr=1e-5")
    for name, coefficient in (("", 0.3), ("-1", 1), ("-3", 3)):
        anchor = f"actor_rollout_ref.actor.sft_anchor_coef={coefficient}"
        yield _gad(f"GAD-last-token-warm-anchor{name}", *LAST_TOKEN, *WARM, anchor)
    anchored = (*LAST_TOKEN, *WARM, "actor_rollout_ref.actor.sft_anchor_coef=0.3")
    yield _gad("GAD-last-token-warm-anchor-length-correction", *anchored, "algorithm.length_correction=True")
    yield _gad("GAD-warm-anchor", *WARM, "actor_rollout_ref.actor.sft_anchor_coef=0.3")
    yield _gad("GAD-papers-loss-warm", *PAPERS_LOSS, *WARM)
    anchored = (*LAST_TOKEN, *WARM, "actor_rollout_ref.actor.sft_anchor_coef=1")
    yield _gad("GAD-last-token-warm-anchor-1-auto", *anchored, "trainer.critic_warmup=auto")
    yield _gad("GAD-last-token-warm-anchor-1-slow", *anchored, "actor_rollout_ref.actor.optim.lr=2e-6")
    # What the anchor does alone.
    yield Run("SeqKD-and-on", "SeqKD", (*SEQKD, *GOING_ON), steps=GAD_STEPS, answer_every=100)
    yield _gad("GAD-anchor", "actor_rollout_ref.actor.sft_anchor_coef=0.1")
    yield _gad("GAD-anchor-1", "actor_rollout_ref.actor.sft_anchor_coef=1")
    yield _gad("GAD-no-std", "algorithm.norm_adv_by_std_in_grpo=False")
    yield _gad("GAD-slow-actor", "actor_rollout_ref.actor.optim.lr=2e-6")
    yield _gad("GAD-fast-actor", "actor_rollout_ref.actor.optim.lr=1e-5")
    yield _gad("GAD-length-correction", "algorithm.length_correction=True")
    yield _gad("GAD-eos-not-scored", "critic.discriminator.exclude_eos=True")
    yield _gad("GAD-cut-kept", "algorithm.cut_answers=keep")
    yield _gad("GAD-cut-left-out", "algorithm.cut_answers=leave_out")
    yield _gad("GAD-no-balance", "critic.balance.enable=False")


RUNS: tuple[Run, ...] = tuple(runs())
BY_NAME = {run.name: run for run in RUNS}
