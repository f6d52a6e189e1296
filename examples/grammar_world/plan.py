"""What the experiment trains: every run, what it starts from, and its settings.

A run is a name such as `GAD-frozen-ranking-mean-replay`; `RUNS` lists them in an order in which each can be run after
those before it. Everything is declared here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

LOSSES = {"bradley_terry": "last_token", "hinge": "mean", "two_sided_hinge": "mean", "ranking": "mean"}  # own pooling
POOLINGS = ("last_token", "mean")

BATCH = 64  # prompts per step, in every run
N = 8
SEQKD_STEPS = 192
WARMUP_STEPS = 150  # of the discriminator alone; a warmup by SFT takes SEQKD_STEPS, and trains the student along
GAD_STEPS = 80
# A GAD step forwards or updates n answers a prompt where SeqKD updates one: in forwards of one answer (an update is
# three), generation, old and reference log-probs n each, the actor 3 n, the discriminator 3 (n + 1).
COST_OF_GAD = (3 * N + 3 * N + 3 * (N + 1)) / 3
COST_OF_WARMUP = (3 * N + 3 * (N + 1)) / 3
SEQKD_LONG_STEPS = round(COST_OF_WARMUP * WARMUP_STEPS + COST_OF_GAD * GAD_STEPS)

COMMON = (
    "trainer.device=cpu",
    f"data.train_batch_size={BATCH}",
    "data.max_prompt_length=24",
    "data.max_response_length=32",
    f"actor_rollout_ref.rollout.n={N}",
    # The student's distribution is measured at temperature 1, so it is trained there.
    "actor_rollout_ref.rollout.temperature=1.0",
    "actor_rollout_ref.rollout.max_num_seqs=512",
    "trainer.log_val_generations=0",
    "trainer.test_freq=20",
    "trainer.logger=[file]",
    "trainer.resume_mode=disable",
    "critic.held_out_prompts=32",
    "data.val_max_samples=32",
    # As it was run: before these had other defaults.
    "critic.discriminator.exclude_eos=True",
    "critic.discriminator.ranking.reg_on=raw",
    "critic.balance.enable=False",
    "algorithm.cut_answers=keep",
    "actor_rollout_ref.actor.sft_anchor_coef=0",
)
SEQKD = ("stage=seqkd", "actor_rollout_ref.actor.optim.lr=1e-3", "trainer.sft_monitor_freq=-1", "trainer.test_freq=-1",
         "trainer.val_before_train=False")  # fmt: skip
# The discriminator is fast and the student slow, so that the student never outruns its judge.
ADVERSARIAL = (
    "critic.optim.lr=1e-3",
    "critic.optim.lr_warmup_steps=5",
    "actor_rollout_ref.actor.optim.lr=3e-5",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=5",
)
REPLAY = ("critic.replay.capacity=8192", "critic.replay.fraction=0.5")


@dataclass(frozen=True)
class Run:
    """One training run.

    actor, critic: the runs it starts from, or "base".
    steps: how many it takes.
    measured: steps after which the student is measured, multiples of the first.
    overrides: settings beyond `COMMON`.
    """

    name: str
    actor: str
    critic: str | None
    steps: int
    measured: tuple[int, ...]
    overrides: tuple[str, ...]

    @property
    def parents(self) -> set[str]:
        """The runs that must be done before."""
        return {parent for parent in (self.actor, self.critic) if parent not in (None, "base")}


def _discriminator(loss: str, pooling: str) -> tuple[str, ...]:
    return (*ADVERSARIAL, f"critic.discriminator.loss={loss}", f"critic.discriminator.pooling={pooling}")


def _warmup(kind: str, loss: str, pooling: str) -> Run:
    """`frozen`: the discriminator alone, against SeqKD's student. `sft`: both from the base, as in the paper."""
    name = f"warmup-{kind}-{loss}-{pooling}"
    settings = ("stage=warmup", *_discriminator(loss, pooling))
    if kind == "sft":
        sft = ("trainer.warmup_use_sft=True", "actor_rollout_ref.actor.optim.lr=1e-3",
               "actor_rollout_ref.actor.optim.lr_warmup_steps=0")  # fmt: skip
        return Run(name, "base", "base", SEQKD_STEPS, (SEQKD_STEPS,), (*settings, *sft))
    return Run(name, "SeqKD", "SeqKD", WARMUP_STEPS, (), (*settings, f"trainer.critic_warmup={WARMUP_STEPS}"))


def _gad(name: str, warmup: str, loss: str, pooling: str, *more: str) -> Run:
    measured = (GAD_STEPS // 2, GAD_STEPS)
    return Run(f"GAD-{name}", warmup, warmup, GAD_STEPS, measured, ("stage=gad", *_discriminator(loss, pooling), *more))


def _main_runs() -> Iterator[Run]:
    """One thing differs at a time: the loss, then its pooling, replay, or the warmup."""
    for loss, pooling in product(LOSSES, POOLINGS):
        yield _warmup("frozen", loss, pooling)
        of = f"{loss}-{pooling}"
        yield _gad(f"frozen-{of}-fresh", f"warmup-frozen-{of}", loss, pooling)
        if pooling == LOSSES[loss]:
            yield _gad(f"frozen-{of}-replay", f"warmup-frozen-{of}", loss, pooling, *REPLAY)
            yield _warmup("sft", loss, pooling)
            yield _gad(f"sft-{of}-fresh", f"warmup-sft-{of}", loss, pooling)


def _contrasts() -> Iterator[Run]:
    """The two learners at other speeds, few rows, and the adaptive temperature."""
    paper = ("bradley_terry", "last_token")
    warmup = "warmup-frozen-bradley_terry-last_token"
    yield _gad("fast-actor", warmup, *paper, "actor_rollout_ref.actor.optim.lr=1e-4")
    yield _gad("fast-actor-3-epochs", warmup, *paper, "actor_rollout_ref.actor.optim.lr=1e-4", "critic.ppo_epochs=3")
    yield _gad("slow-actor", warmup, *paper, "actor_rollout_ref.actor.optim.lr=1e-5")
    yield _gad("slow-discriminator", warmup, *paper, "critic.optim.lr=1e-4")
    adaptive = "critic.discriminator.adaptive_temperature.enable=True"
    yield _gad("adaptive-temperature", "warmup-frozen-ranking-mean", "ranking", "mean", adaptive)
    few = "data.train_max_samples=384"
    yield Run("SeqKD-few-rows", "base", None, SEQKD_STEPS, (SEQKD_STEPS,), (*SEQKD, few))
    frozen = ("stage=warmup", *_discriminator(*paper), f"trainer.critic_warmup={WARMUP_STEPS}", few)
    yield Run("warmup-few-rows", "SeqKD-few-rows", "SeqKD-few-rows", WARMUP_STEPS, (), frozen)
    yield _gad("few-rows", "warmup-few-rows", *paper, few)


_LONG = tuple(SEQKD_LONG_STEPS // 8 * part for part in range(1, 9))
RUNS: tuple[Run, ...] = (
    Run("SeqKD", "base", None, SEQKD_STEPS, (SEQKD_STEPS,), SEQKD),
    Run("SeqKD-long", "base", None, _LONG[-1], _LONG, SEQKD),
    *_main_runs(),
    *_contrasts(),
)
