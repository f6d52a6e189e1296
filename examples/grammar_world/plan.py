"""What the experiment trains: every run, what it starts from, and its settings.

A run is a name such as `GAD-frozen-ranking-mean-replay`; `RUNS` lists them in an order in which each can be run after
those before it. Everything is declared here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

LOSSES = ("bradley_terry", "hinge", "two_sided_hinge", "ranking")
POOLINGS = ("last_token", "mean")
WARMUPS = ("frozen", "sft")
REPLAYS = ("fresh", "replay")

BATCH = 64  # prompts per step, in every run
N = 8
SEQKD_STEPS = 60
WARMUP_STEPS = 40  # of the discriminator alone; a warmup by SFT takes SEQKD_STEPS, and trains the student along
GAD_STEPS = 160
# A GAD step forwards or updates n answers a prompt where SeqKD updates one: in forwards of one answer (an update is
# three), generation, old and reference log-probs n each, the actor 3 n, the discriminator 3 (n + 1).
COST_OF_GAD = (3 * N + 3 * N + 3 * (N + 1)) / 3
COST_OF_WARMUP = (3 * N + 3 * (N + 1)) / 3
SEQKD_LONG_STEPS = round(COST_OF_WARMUP * WARMUP_STEPS + COST_OF_GAD * GAD_STEPS)

COMMON = (
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
    measured: steps after which the student is measured, the last one always.
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
    name = f"warmup-{kind}-{loss}-{pooling}"
    settings = ("stage=warmup", *_discriminator(loss, pooling))
    if kind == "sft":
        sft = ("trainer.warmup_use_sft=True", "actor_rollout_ref.actor.optim.lr=1e-3",
               "actor_rollout_ref.actor.optim.lr_warmup_steps=0")  # fmt: skip
        return Run(name, "base", "base", SEQKD_STEPS, (SEQKD_STEPS,), (*settings, *sft))
    frozen = f"trainer.critic_warmup={WARMUP_STEPS}"
    return Run(name, "SeqKD", "SeqKD", WARMUP_STEPS, (), (*settings, frozen))


def _gad(kind: str, loss: str, pooling: str, replay: str) -> Run:
    warmup = f"warmup-{kind}-{loss}-{pooling}"
    settings = ("stage=gad", *_discriminator(loss, pooling), *(REPLAY if replay == "replay" else ()))
    quarters = tuple(GAD_STEPS * quarter // 4 for quarter in (1, 2, 3, 4))
    return Run(f"GAD-{kind}-{loss}-{pooling}-{replay}", warmup, warmup, GAD_STEPS, quarters, settings)


RUNS: tuple[Run, ...] = (
    Run("SeqKD", "base", None, SEQKD_STEPS, (SEQKD_STEPS,), SEQKD),
    Run("SeqKD-long", "base", None, SEQKD_LONG_STEPS, tuple(SEQKD_LONG_STEPS * i // 16 for i in range(1, 17)), SEQKD),
    *(_warmup(*of) for of in product(WARMUPS, LOSSES, POOLINGS)),
    *(_gad(*of) for of in product(WARMUPS, LOSSES, POOLINGS, REPLAYS)),
)
