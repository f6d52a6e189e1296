"""One whole training step through the real loop: GAD with KL, or GRPO with a rule in the discriminator's place.

    python -m benchmarks.step --shape 1.5b --out step.json
    python -m benchmarks.step --algorithm grpo --ways ours

64 prompts of about 220 tokens with 8 answers of 256 each: generation, the push of the weights, scores, the
discriminator's update, reference log-probs, advantages, the actor's update. `ours` is the trainer as it is, in process
on one device; `classic` is the same loop with what this trainer leaves out put back: padded rows, full logits, nothing
compiled, the teacher's answer beside every student's, passes of their own for scores and old log-probs, and an engine
that reports every log-prob and writes out every answer. Seconds are medians over the steps after the warm-up, as
the trainer's `timing_s/*` has them; `overhead` is the share of the step that is neither generation nor a forward or
backward pass. On a GPU each way gets a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from benchmarks.classic import ClassicActorWorker, ClassicCriticWorker, classic_step
from benchmarks.common import Report, free_memory, in_processes, parser, say
from benchmarks.engines import engine_name
from benchmarks.inputs import Lengths, base_overrides, classic_overrides, compose, fast_overrides, model_folder
from benchmarks.shapes import SHAPES
from verl.batch import teacher_response_mask
from verl.config import CriticConfig
from verl.protocol import DataProto
from verl.single_controller import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import Config
from verl.trainer.in_process import InProcessRunner, InProcessTrainer
from verl.trainer.main_ppo import TaskRunner, run_ppo
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import Role
from verl.utils.dump import write_jsonl
from verl.utils.startup import Phase
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

WAYS = ("ours", "classic")
# Phases by their names in `timing_s/*`; those of the second line are neither generation nor a pass through a model.
PASSES = ("gen", "values", "update_critic", "old_log_prob", "ref", "update_actor")
OVERHEAD = ("push_weights", "adv", "rest")
COLUMNS = (
    "algorithm", "way", "step", *PASSES, *OVERHEAD, "overhead", "tokens_per_s", "peak_gib", "sync_gap", "times_classic",
)  # fmt: skip
# Both ways start from the same weights and prompts: what shows that they compute the same.
FIRST_STEP = ("critic/d_loss", "critic/grad_norm", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm")
LENGTHS = Lengths((128, 312), (64, 256))
TINY_LENGTHS = Lengths((6, 16), (4, 8))
CLASSIC_TOKENS = 16384
# Of the whole device; both models with their optimizers have to fit beside it.
ENGINE_SHARE = 0.35


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--algorithm", choices=["gad", "grpo"], default="gad")
    result.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    result.add_argument("--ranks", type=int, default=1, help="devices; several run through Ray, ours alone")
    result.add_argument("--prompts", type=int, default=64, help="of one step")
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--tokens", type=int, default=32768, help="of a micro-batch of ours")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    result.add_argument("--steps", type=int, default=3, help="steps that are")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings, for both ways")
    return result


class NoCheckpoints:
    """Checkpoints are not what is measured."""

    def save(self, step: int, only_as_best: bool = False) -> None:
        """Nothing."""

    def write_checkpoint(self, step: int, only_as_best: bool = False) -> None:
        """Nothing."""


class BenchmarkTrainer(NoCheckpoints, InProcessTrainer):
    """The trainer in process."""


class RayBenchmarkTrainer(NoCheckpoints, RayPPOTrainer):
    """The trainer on several ranks."""


class ClassicTrainer(BenchmarkTrainer):
    """Scores come from a pass of their own."""

    def init_workers(self) -> None:
        super().init_workers()
        self.discriminator.scores_from_update = False


class RuleCritic(Worker):
    """In the discriminator's place for GRPO: scores by a rule, and nothing to train."""

    def __init__(
        self,
        config: CriticConfig,
        device: str,
        seed: int,
        total_steps: int,
        eos_token_ids: tuple[int, ...],
        collective_timeout: timedelta,
    ):
        super().__init__()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """There is no model."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def checkpoint_bytes(self) -> int:
        """Nothing is saved."""
        return 0

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def start_phases(self) -> list[Phase]:
        """What it does takes no time."""
        return []

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def score_and_update_critic(self, data: DataProto) -> DataProto:
        """The scores of all answers, under the names that the discriminator's have."""
        batch, columns = data.batch, {}
        sides = {
            "student": (batch["responses"], batch["response_mask"]),
            "teacher": (batch["teacher_response"].unsqueeze(1), teacher_response_mask(data).unsqueeze(1)),
        }
        for side, (ids, mask) in sides.items():
            even, tokens = ((ids % 2 == 0) * mask).sum(-1).float(), mask.sum(-1).float()
            columns |= {f"{side}_scores": even / tokens, f"{side}_raw_scores": even, f"{side}_score_tokens": tokens}
        return DataProto.from_dict(columns, meta_info={"metrics": {}})


def even_share(ids: list[int]) -> float:
    """The rule for one answer: its share of even token ids, which differs between answers of one length."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


# ---------------------------------------------------------------------------------------------------------------------


def random_texts(rows: int, lengths: Lengths, template_tokens: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and teacher answers of random letters, whose lengths in tokens are drawn from `lengths`.

    A letter is a token; the chat template adds `template_tokens` to a prompt, and EOS one to an answer.
    """
    draw = random.Random(seed)

    def text(bounds: tuple[int, int], added: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=draw.randint(*bounds) - added))

    return [
        {
            "content": [{"role": "user", "content": text(lengths.prompt, template_tokens)}],
            "teacher_response": text(lengths.answer, added=1),
        }
        for _ in range(rows)
    ]


def lengths_of(args: argparse.Namespace) -> Lengths:
    """Lengths in tokens of the step's prompts and answers."""
    return TINY_LENGTHS if args.shape == "tiny" else LENGTHS


def settings(args: argparse.Namespace, way: str, models: Path, folder: Path) -> Config:
    """The run's configuration; data and metrics are in `folder`."""
    lengths = lengths_of(args)
    data = folder / "prompts.jsonl"
    write_jsonl(data, random_texts(4 * args.prompts, lengths))
    overrides = [
        "stage=gad",
        *base_overrides(models, args.device),
        f"data.train_files={data}",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={lengths.prompt[1]}",
        f"data.max_response_length={lengths.answer[1]}",
        f"trainer.total_training_steps={args.warmup + args.steps}",
        f"trainer.default_local_dir={folder}",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.n_gpus_per_node={args.ranks}",
        f"actor_rollout_ref.rollout.name={engine_name(args.device)}",
        f"actor_rollout_ref.rollout.n={args.n}",
        f"actor_rollout_ref.rollout.max_num_seqs={args.prompts * args.n}",
        f"actor_rollout_ref.rollout.gpu_memory_utilization={ENGINE_SHARE}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={args.tokens}",
        f"critic.ppo_max_token_len_per_gpu={args.tokens}",
    ]
    overrides += fast_overrides(args.device) if way == "ours" else classic_overrides(CLASSIC_TOKENS, lengths.width)
    return compose(overrides + args.set)


def train(config: Config, algorithm: str, way: str) -> None:
    """Run the loop to its last step."""
    classic = way == "classic"
    actor, critic = (ClassicActorWorker, ClassicCriticWorker) if classic else (ActorRolloutRefWorker, CriticWorker)
    if algorithm == "grpo":
        critic = RuleCritic
    several = config.trainer.ranks > 1

    class Runner(TaskRunner if several else InProcessRunner):
        trainer_class = ClassicTrainer if critic is ClassicCriticWorker else BenchmarkTrainer
        worker_classes: ClassVar = {Role.ActorRollout: actor, Role.Critic: critic}

    if several:
        Runner.trainer_class = RayBenchmarkTrainer
        return run_ppo(config, Runner)
    with classic_step() if classic else nullcontext():
        Runner().run(config)


def summarize(lines: list[dict[str, float]], warmup: int) -> dict[str, Any]:
    """The medians of the steps' metrics after the warm-up, and every counted step's seconds."""
    counted = lines[warmup:]

    def middle(name: str) -> float | None:
        values = [line[name] for line in counted if name in line]
        return median(values) if values else None

    row = {name: middle(f"timing_s/{name}") for name in ("step", *PASSES, *OVERHEAD)}
    row["rest"] = row["step"] - sum(row[name] or 0.0 for name in (*PASSES, *OVERHEAD))
    row["overhead"] = sum(row[name] or 0.0 for name in OVERHEAD) / row["step"]
    return row | {
        "tokens_per_s": middle("perf/throughput"),
        "peak_gib": middle("perf/max_memory_allocated_gb"),
        "sync_gap": middle("training/rollout_probs_diff_mean"),
        "prompt_length": middle("prompt_length/mean"),
        "response_length": middle("response_length/mean"),
        "first_step": {name: lines[0][name] for name in FIRST_STEP if name in lines[0]},
        "all_seconds": [line["timing_s/step"] for line in counted],
        "warmup_seconds": [line["timing_s/step"] for line in lines[:warmup]],
    }


def time_step(args: argparse.Namespace, way: str, report: Report) -> None:
    """Train for a few steps one way, and report."""
    with model_folder(SHAPES[args.shape], args.device) as models, tempfile.TemporaryDirectory() as name:
        say(f"{way}: wrote random models of shape {args.shape}")
        folder = Path(name)
        train(settings(args, way, models, folder), args.algorithm, way)
        lines = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report.add(algorithm=args.algorithm, way=way, **summarize(lines, args.warmup))
    free_memory()


def compare(report: Report) -> None:
    """Write into our row how many times as fast as the classic way it was."""
    seconds = {row["way"]: row["step"] for row in report.rows}
    for row in report.rows:
        if row["way"] == "ours" and "classic" in seconds:
            row["times_classic"] = seconds["classic"] / row["step"]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    if args.ranks > 1 and args.ways != ["ours"]:
        arguments().error("the classic way runs on one device: with --ranks give --ways ours")
    report = Report("step", args, COLUMNS)
    if args.device == "cuda" and len(args.ways) > 1:
        # What an engine leaves on the device must not stand in the next one's way.
        in_processes("benchmarks.step", argv, "--ways", args.ways, report)
    else:
        for way in args.ways:
            time_step(args, way, report)
    compare(report)
    return report.finish()


if __name__ == "__main__":
    main()
