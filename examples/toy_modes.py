"""What the two objectives do to a student that is too small for its teacher, on a problem with a known answer.

    python examples/toy_modes.py [--seeds 5] [--steps 800] [--out outputs/toy_modes.png]      # matplotlib draws

The set-up of Figure 5 of the GAD paper (arXiv 2511.10643): the teacher is a mixture of Gaussians over ten classes, the
student one Gaussian over the same classes, and only samples of the teacher are visible. An answer is one token. From
one start, SeqKD trains on the teacher's answers with `compute_sft_loss`; GAD trains on the student's own answers with
GRPO advantages and GSPO, against a discriminator with one free score per class and each registered loss. The paper's
own numbers were not at hand: those below are ours.

On the teacher `uneven` (a wide heavy mode, a narrow light one) maximum likelihood covers both modes and fills the
valley, and GAD settles on the heavy mode with all four losses. On `narrow` (two modes of equal width) GAD stays as
spread as SeqKD, though the heavy mode alone would be better: KL(student||teacher) 0.51 against 1.53 nats. The rows
`exact`, which follow the true divergences' gradients from the same start, agree on both teachers: the spread student is
a local minimum. GAD seeks a mode where one is downhill; that depends on the teacher and on the start.

Tried beside this, bradley_terry with three seeds unless it says more: starts of std 1 to 6 at class 4.5 reach the heavy
mode of `uneven`; a start inside a mode stays in it, on `narrow` too, where the other losses end as spread. Equal widths
(std 0.7) weighted 0.7/0.3 end spread from narrow starts, on the heavy mode from most broad ones, though the exact
descent stays spread. With actor_lr 0.02 and critic_lr 0.05, five seeds, bradley_terry and ranking wander about the mode
(drift 0.3); of ten hinge and two_sided_hinge runs half end spread, and one shrank to class 0, in no mode: all answers
score alike there and nothing moves again. Scores of classes the student has left grow on under bradley_terry and hinge.

Left out: prompts that differ, answers of several tokens (so pooling has no say), a KL term, and several updates per
batch (so the ratio is 1 and the clip never acts).
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from verl.trainer.ppo.core_algos import (
    PairScores,
    compute_grpo_outcome_advantage,
    compute_sft_loss,
    get_discriminator_loss_fn,
    get_policy_loss_fn,
)

COLUMNS = ("valley", "KL(S||T)", "KL(T||S)", "mean", "std", "drift")
SEQKD = "SeqKD"


@dataclass(frozen=True)
class Mixture:
    """A teacher: its Gaussians, the classes that count as each one's mode, and those of the valley between."""

    name: str
    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    modes: tuple[tuple[int, ...], ...]
    valley: tuple[int, ...]


UNEVEN = Mixture("uneven", (0.7, 0.3), (3.0, 8.0), (1.0, 0.6), ((1, 2, 3, 4, 5), (7, 8, 9)), (6,))
NARROW = Mixture("narrow", (0.6, 0.4), (2.0, 7.0), (0.6, 0.6), ((1, 2, 3), (6, 7, 8)), (4, 5))
EXPERIMENTS = ((UNEVEN, ("bradley_terry", "hinge", "two_sided_hinge", "ranking")), (NARROW, ("bradley_terry",)))


@dataclass(frozen=True)
class Toy:
    """Every constant of a run. The policy loss reads its clip constants from here."""

    classes: int = 10
    teacher_answers: int = 4096
    start_mean: float = 4.5
    start_std: float = 3.0
    steps: int = 800
    critic_warmup: int = 100
    prompts: int = 32
    answers_per_prompt: int = 8
    actor_lr: float = 0.01
    critic_lr: float = 0.1
    clip_ratio: float = 0.1
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float = 3.0
    exact_steps: int = 2000


def gaussian_log_probs(mean: torch.Tensor, log_std: torch.Tensor, classes: int) -> torch.Tensor:
    """Log-probs of q(k) proportional to exp(-(k - mean)^2 / (2 std^2)), k = 0..V-1: (V,) from scalars, (R, V) from
    (R, 1)."""
    k = torch.arange(classes, dtype=mean.dtype)
    return torch.log_softmax(-(k - mean).square() / (2 * (2 * log_std).exp()), dim=-1)


def mixture_probs(teacher: Mixture, classes: int) -> torch.Tensor:
    """(V,) probabilities proportional to sum_i weight_i * exp(-(k - mean_i)^2 / (2 std_i^2)), k = 0..V-1."""
    weights, means, stds = (torch.tensor(x).unsqueeze(-1) for x in (teacher.weights, teacher.means, teacher.stds))
    mass = (weights * torch.exp(-(torch.arange(classes) - means).square() / (2 * stds.square()))).sum(0)
    return mass / mass.sum()


class Student(torch.nn.Module):
    """One discretised Gaussian and its optimizer; `trace` keeps (mean, log_std) after every update."""

    def __init__(self, toy: Toy):
        super().__init__()
        self.classes = toy.classes
        self.mean = torch.nn.Parameter(torch.tensor(toy.start_mean))
        self.log_std = torch.nn.Parameter(torch.tensor(math.log(toy.start_std)))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=toy.actor_lr)
        self.trace: list[tuple[float, float]] = []

    def log_probs(self) -> torch.Tensor:
        """The log-probs (V,) of all classes."""
        return gaussian_log_probs(self.mean, self.log_std, self.classes)

    def update(self, loss: torch.Tensor) -> None:
        """One step of Adam down `loss`, a scalar."""
        descend(self.optimizer, loss)
        self.trace.append((self.mean.item(), self.log_std.item()))


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of `optimizer` down `loss`."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def sample(probs: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 1) answers of one token, from probabilities (V,)."""
    return torch.multinomial(probs, count, replacement=True, generator=generator).unsqueeze(-1)


def train_seqkd(toy: Toy, answers: torch.Tensor, generator: torch.Generator) -> Student:
    """Maximum likelihood on the teacher's answers (A, 1)."""
    student, mask = Student(toy), torch.ones(toy.prompts, 1)
    for _ in range(toy.steps):
        tokens = answers[torch.randint(len(answers), (toy.prompts,), generator=generator)]
        student.update(compute_sft_loss(student.log_probs()[tokens], mask))
    return student


def train_gad(toy: Toy, answers: torch.Tensor, generator: torch.Generator, loss: str) -> Student:
    """The trainer's step, in its order, against a discriminator with one free score per class; for the first
    `critic_warmup` steps the discriminator alone is trained."""
    student, scores = Student(toy), torch.zeros(toy.classes, requires_grad=True)
    critic_optimizer = torch.optim.Adam([scores], lr=toy.critic_lr)
    discriminator_loss, policy_loss = get_discriminator_loss_fn(loss), get_policy_loss_fn("gspo")
    rows = toy.prompts * toy.answers_per_prompt
    mask, uid = torch.ones(rows, 1), np.repeat(np.arange(toy.prompts), toy.answers_per_prompt)
    student_mask, teacher_mask = mask.view(toy.prompts, -1, 1), torch.ones(toy.prompts, 1, 1)

    for step in range(toy.critic_warmup + toy.steps):
        teacher_tokens = answers[torch.randint(len(answers), (toy.prompts,), generator=generator)]
        with torch.no_grad():
            log_probs = student.log_probs()
            tokens = sample(log_probs.exp(), rows, generator)
            old_log_prob, rewards = log_probs[tokens], scores[tokens]
        advantages, _ = compute_grpo_outcome_advantage(rewards, mask, uid)

        student_values, teacher_values = scores[tokens].view_as(student_mask), scores[teacher_tokens].unsqueeze(-1)
        pairs = PairScores.pool(student_values, teacher_values, student_mask, teacher_mask, discriminator_loss.pooling)
        descend(critic_optimizer, discriminator_loss.fn(pairs)[0])
        if step >= toy.critic_warmup:
            log_prob = student.log_probs()[tokens]
            student.update(policy_loss(old_log_prob, log_prob, advantages, mask, "token-mean", toy)[0])
    return student


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, from log-probs (V,)."""
    return (p.exp() * (p - q)).sum()


def train_exact(toy: Toy, truth: torch.Tensor, reverse: bool) -> Student:
    """Down the exact gradient of KL(teacher||student), or with `reverse` of KL(student||teacher): a reference that
    knows the teacher's log-probs (V,)."""
    student = Student(toy)
    for _ in range(toy.exact_steps):
        q = student.log_probs()
        student.update(kl(q, truth) if reverse else kl(truth, q))
    return student


@dataclass(frozen=True)
class Result:
    """One trained student: its probabilities (V,) and its row of the table, its modes and COLUMNS."""

    method: str
    seed: int | None
    probs: torch.Tensor
    row: tuple[float, ...]


def moments(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (...) of distributions (..., V) over their classes."""
    k = torch.arange(probs.shape[-1], dtype=probs.dtype)
    mean = (probs * k).sum(-1)
    return mean, (probs * (k - mean.unsqueeze(-1)).square()).sum(-1).sqrt()


@torch.no_grad()
def measure(method: str, seed: int | None, student: Student, teacher: Mixture) -> Result:
    """`drift` is the std of the student's mean over the last quarter of its updates: 0 when it has settled."""
    log_probs, truth = student.log_probs(), mixture_probs(teacher, student.classes).log()
    probs = log_probs.exp()
    masses = [probs[list(classes)].sum() for classes in (*teacher.modes, teacher.valley)]
    late = torch.tensor(student.trace[-(len(student.trace) // 4) :])
    drift = moments(gaussian_log_probs(late[:, :1], late[:, 1:], student.classes).exp())[0].std()
    row = (*masses, kl(log_probs, truth), kl(truth, log_probs), *moments(probs), drift)
    return Result(method, seed, probs, tuple(value.item() for value in row))


def run(toy: Toy, teacher: Mixture, losses: tuple[str, ...], seeds: int) -> list[Result]:
    """Every method on every seed; a seed's methods share the teacher's answers. The exact references come last."""
    truth = mixture_probs(teacher, toy.classes)
    results = []
    for seed in range(seeds):
        answers = sample(truth, toy.teacher_answers, torch.Generator().manual_seed(seed))
        student = train_seqkd(toy, answers, torch.Generator().manual_seed(1000 + seed))
        results.append(measure(SEQKD, seed, student, teacher))
        for loss in losses:
            student = train_gad(toy, answers, torch.Generator().manual_seed(1000 + seed), loss)
            results.append(measure(f"GAD {loss}", seed, student, teacher))
    for method, reverse in (("exact KL(T||S)", False), ("exact KL(S||T)", True)):
        results.append(measure(method, None, train_exact(toy, truth.log(), reverse), teacher))
    return results


def by_method(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each method, in the order of their first appearance."""
    return {m: [r for r in results if r.method == m] for m in dict.fromkeys(r.method for r in results)}


def table(teacher: Mixture, results: list[Result]) -> str:
    """One line per run, then mean and std over the seeds."""
    columns = (*(f"mode {mean:g}" for mean in teacher.means), *COLUMNS)
    lines = [str(teacher), f"{'':28}" + "".join(f"{name:>14}" for name in columns)]
    for r in results:
        seed = "" if r.seed is None else f"seed {r.seed}"
        lines.append(f"{r.method:20} {seed:7}" + "".join(f"{value:14.3f}" for value in r.row))
    for method, group in by_method(results).items():
        rows = np.array([r.row for r in group])
        if len(rows) > 1:
            cells = (f"{mean:.2f} +- {std:.2f}" for mean, std in zip(rows.mean(0), rows.std(0, ddof=1), strict=True))
            lines.append(f"{method:20} {'mean':7}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def draw(tables: list[tuple[Mixture, list[Result]]], classes: int, out: Path) -> None:
    """SeqKD against GAD on each teacher, and between them GAD's losses on the first teacher; every seed is a line."""
    from matplotlib.figure import Figure

    (first, results), (second, more) = tables
    losses = [method for method in by_method(results) if method.startswith("GAD")]
    colours = {method: f"C{i}" for i, method in enumerate([SEQKD, *losses])}
    panels = (
        (first, results, (losses[0], SEQKD), "one mode is downhill"),
        (first, results, losses, "GAD with each loss"),
        (second, more, (losses[0], SEQKD), "spread is a local minimum"),
    )
    figure, k = Figure(figsize=(12, 4.2), dpi=100, layout="constrained"), np.arange(classes)
    for axes, (teacher, runs, methods, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        axes.bar(k, mixture_probs(teacher, classes), color="0.82", label="teacher")
        for method in methods:
            style = "s--" if method == SEQKD else "o-"
            probs = torch.stack([r.probs for r in by_method(runs)[method]], dim=1)
            lines = axes.plot(k, probs, colours[method] + style, markersize=3, linewidth=1, alpha=0.8)
            lines[0].set_label(method)
        axes.set(title=f"{teacher.name}: {title}", xlabel="class (a line is a seed)", xticks=k, ylim=(0, 0.7))
        axes.legend(loc="upper right", fontsize=9)
    figure.axes[0].set_ylabel("probability")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 (default 5)")
    parser.add_argument("--steps", type=int, default=Toy.steps, help=f"updates of the student (default {Toy.steps})")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_modes.png"), help="the figure's file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    toy, start = replace(Toy(), steps=arguments.steps), time.perf_counter()
    print(toy)
    tables = []
    for teacher, losses in EXPERIMENTS:
        tables.append((teacher, run(toy, teacher, losses, arguments.seeds)))
        print("\n" + table(*tables[-1]), flush=True)
    draw(tables, toy.classes, arguments.out)
    print(f"\n{arguments.out} drawn; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
