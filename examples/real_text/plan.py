"""What the experiment trains: every run, what it starts from, and its settings.

A run is a name; `runs` lists them in an order in which each can be run after those before it. One thing differs at a
time from `GAD`, which has the trainer's defaults but for what a small student and short training ask: learning rates,
batch and length. The runs whose names begin with `earlier` differ from `earlier` instead, which has the defaults of the
time before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 64  # prompts per step
N = 8
HEAD_START = 30  # steps of the discriminator alone
LONG_HEAD_START = 100  # at .8, where after 30 it tells nothing apart
GAD_STEPS = 200  # of both, after the head start
ANSWERS = 4  # to each of the judge's prompts, from every student
TEMPERATURES = (0.8, 1.0)  # they are drawn at

COMMON = (
    f"data.train_batch_size={BATCH}",
    "data.filter_overlong_prompts=True",
    "data.max_response_length=256",  # the teacher's short answers; 768 for chat: --extra data.max_response_length=768
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
    f"actor_rollout_ref.rollout.n={N}",
    "actor_rollout_ref.actor.optim.lr=5e-6",
    # At 1e-5 it told nothing apart after 27 steps; at 5e-5 four of five held-out pairs after 30.
    "critic.optim.lr=5e-5",
    "critic.optim.lr_warmup_steps=5",
)
GOING_ON = ("actor_rollout_ref.actor.optim.lr=5e-6", "actor_rollout_ref.actor.optim.lr_scheduler_type=constant")
SODA = ("stage=soda", "actor_rollout_ref.actor.optim.lr=5e-6", "actor_rollout_ref.actor.optim.lr_warmup_steps=10")
RANKING = ("critic.discriminator.loss=ranking",)
BRADLEY_TERRY = ("critic.discriminator.loss=bradley_terry",)
LAST_TOKEN = ("critic.discriminator.pooling=last_token",)
# The form that `ranking` grew out of, on sums over tokens, with nothing beside it that the trainer has learned since.
USERS_FORMULA = (
    *RANKING,
    "critic.discriminator.ranking.reg_on=raw",
    "critic.discriminator.exclude_eos=True",
    "critic.balance.enable=False",
    "algorithm.cut_answers=keep",
)
PAPERS_LOSS = (
    *BRADLEY_TERRY,
    *LAST_TOKEN,
    "critic.discriminator.exclude_eos=True",
    "critic.balance.enable=False",
    "algorithm.cut_answers=keep",
)
LENGTH_CORRECTION = "algorithm.length_correction=True"
NO_STD = "algorithm.norm_adv_by_std_in_grpo=False"


def _anchor(coefficient: float) -> str:
    return f"actor_rollout_ref.actor.sft_anchor_coef={coefficient}"


def _actor_rate(rate: float) -> str:
    return f"actor_rollout_ref.actor.optim.lr={rate}"


# The student sharpened, as most use it: it has fewer different words than its teacher then.
COOL = ("actor_rollout_ref.rollout.temperature=0.8",)
EARLIER = (*RANKING, *COOL, _anchor(0), "critic.balance.highest=0.85")


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


def _gad(name: str, *more: str, start: str = "SeqKD", head_start: int = HEAD_START) -> Run:
    first = f"trainer.critic_warmup={head_start}"
    return Run(name, start, (*GAD, first, *more), steps=head_start + GAD_STEPS, answer_every=100)


def _earlier(name: str, *more: str, start: str = "SeqKD") -> Run:
    return _gad(name, *EARLIER, *more, start=start)


def _soda(name: str, *more: str, start: str = "SeqKD") -> Run:
    return Run(name, start, (*SODA, *more), epochs=2, answer_every=1)


def _without_rewards() -> Iterator[Run]:
    """The base, SeqKD of several lengths and rates, and SODA."""
    yield Run("base", "base", ("stage=seqkd",), steps=0)
    yield Run("SeqKD-2-epochs", "base", SEQKD, epochs=2)
    yield Run("SeqKD", "base", SEQKD, epochs=4)
    yield Run("SeqKD-slow", "base", (*SEQKD, _actor_rate(1e-4)), epochs=4)
    yield Run("SeqKD-fast", "base", (*SEQKD, _actor_rate(4e-4)), epochs=4)
    constant = ("actor_rollout_ref.actor.optim.lr_scheduler_type=constant", _actor_rate(1e-4))
    yield Run("SeqKD-8-epochs", "base", SEQKD, epochs=8)
    yield Run("SeqKD-16-epochs", "base", SEQKD, epochs=16)
    yield Run("SeqKD-constant", "base", (*SEQKD, *constant), epochs=6, answer_every=1)
    # What GAD's further steps would do without a discriminator, and what its anchor does alone.
    yield Run("SeqKD-and-on", "SeqKD", (*SEQKD, *GOING_ON), steps=GAD_STEPS, answer_every=100)
    yield _soda("SODA")
    yield _soda("SODA-sft", "soda.sft_coef=1")
    yield _soda("SODA-slow", _actor_rate(1e-6))


def _from_the_defaults() -> Iterator[Run]:
    """GAD, and one thing changed or left out."""
    yield _gad("GAD")
    yield _gad("GAD-no-anchor", _anchor(0))
    yield _gad("GAD-anchor-1", _anchor(1))
    yield _gad("GAD-anchor-3", _anchor(3))
    yield _gad("GAD-cool", *COOL)
    yield _gad("GAD-cool-long", *COOL, head_start=LONG_HEAD_START)
    yield _gad("GAD-no-balance", "critic.balance.enable=False")
    yield _gad("GAD-ranking", *RANKING)
    yield _gad("GAD-last-token", *LAST_TOKEN)
    yield _gad("GAD-length-correction", LENGTH_CORRECTION)
    yield _gad("GAD-no-std", NO_STD)
    yield _gad("GAD-eos-not-scored", "critic.discriminator.exclude_eos=True")
    yield _gad("GAD-cut-kept", "algorithm.cut_answers=keep")
    yield _gad("GAD-cut-left-out", "algorithm.cut_answers=leave_out")
    yield _gad("GAD-slow-actor", _actor_rate(2e-6))
    yield _gad("GAD-fast-actor", _actor_rate(1e-5))
    yield _gad("GAD-auto", "trainer.critic_warmup=auto")
    yield _gad("GAD-from-2-epochs", start="SeqKD-2-epochs")
    yield _gad("GAD-papers-loss", *PAPERS_LOSS, _anchor(0))
    yield _gad("GAD-users-formula", *USERS_FORMULA, *COOL, _anchor(0))


def _with_adapters() -> Iterator[Run]:
    """The same two stages with adapters of both models in the place of all weights, and with their base in 4 bits."""
    for kind, packed in (("LoRA", False), ("4bit", True)):
        models = ("actor_rollout_ref.model", "critic.model")
        student, critic = (
            (f"{model}.lora_rank=64", f"{model}.lora_alpha=64", f"{model}.load_in_4bit={packed}") for model in models
        )
        # Ten times the rates of whole weights: at five and six times they learned less.
        yield Run(f"SeqKD-{kind}", "base", (*SEQKD, *student, _actor_rate(2e-3)), epochs=4)
        yield _gad(f"GAD-{kind}", *critic, _actor_rate(5e-5), "critic.optim.lr=5e-4", start=f"SeqKD-{kind}")


def _from_the_earlier_defaults() -> Iterator[Run]:
    """Loss `ranking`, temperature .8, no anchor, a wider band: the first and second look of `docs/experiments.md`."""
    yield _earlier("earlier")
    yield _earlier("earlier-from-2-epochs", start="SeqKD-2-epochs")
    yield _earlier("earlier-papers-loss", *PAPERS_LOSS)
    yield _earlier("earlier-bradley_terry", *BRADLEY_TERRY)
    yield _earlier("earlier-last-token", *BRADLEY_TERRY, *LAST_TOKEN)
    yield _earlier("earlier-last-token-anchor", *BRADLEY_TERRY, *LAST_TOKEN, _anchor(0.3))
    yield _earlier("earlier-last-token-fast", *BRADLEY_TERRY, *LAST_TOKEN, _actor_rate(1e-5))
    yield _earlier("earlier-last-token-16-answers", *BRADLEY_TERRY, *LAST_TOKEN, "actor_rollout_ref.rollout.n=16")
    yield _earlier("earlier-last-token-no-std", *BRADLEY_TERRY, *LAST_TOKEN, NO_STD)
    yield _earlier("earlier-last-token-length-correction", *BRADLEY_TERRY, *LAST_TOKEN, LENGTH_CORRECTION)
    yield _earlier("earlier-last-token-ranking", *LAST_TOKEN)
    yield _earlier("earlier-anchor", _anchor(0.1))
    yield _earlier("earlier-anchor-1", _anchor(1))
    yield _earlier("earlier-no-std", NO_STD)
    yield _earlier("earlier-slow-actor", _actor_rate(2e-6))
    yield _earlier("earlier-fast-actor", _actor_rate(1e-5))
    yield _earlier("earlier-length-correction", LENGTH_CORRECTION)
    yield _earlier("earlier-eos-not-scored", "critic.discriminator.exclude_eos=True")
    yield _earlier("earlier-cut-kept", "algorithm.cut_answers=keep")
    yield _earlier("earlier-cut-left-out", "algorithm.cut_answers=leave_out")
    yield _earlier("earlier-no-balance", "critic.balance.enable=False")


def runs() -> Iterator[Run]:
    """All of them."""
    yield from _without_rewards()
    yield from _from_the_defaults()
    yield from _with_adapters()
    yield from _from_the_earlier_defaults()


RUNS: tuple[Run, ...] = tuple(runs())
BY_NAME = {run.name: run for run in RUNS}
