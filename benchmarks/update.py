"""One optimizer step: the actor's by SFT and by GSPO with KL, and the discriminator's, on answers of mixed length.

    python -m benchmarks.update --shape 1.5b --out update.json

Each is timed as this trainer does it (rows packed end to end, compiled layers, logits of the answers alone, a
teacher's answer once for all n students) and the classic way (rows padded to full width, nothing compiled, all logits,
a teacher's answer beside every student's), by the workers' own `update_actor` and `update_critic`, optimizer included.
Tokens are those of all sequences, each with its prompt, also where that is computed once for several; padding is none.
`mfu` counts 6 N T + attention with such a prompt once, `mfu_done` the LM head where it is applied (`shapes.py`).
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from benchmarks.classic import as_pairs, classic_models
from benchmarks.common import Report, device_limits, free_memory, measure, parser, say
from benchmarks.inputs import (
    DOCUMENTS,
    MIXED,
    TINY,
    Lengths,
    base_overrides,
    batch_of_tokens,
    classic_overrides,
    compose,
    fast_overrides,
    model_folder,
    repeated_prompts,
    rows_of,
)
from benchmarks.profiling import profile
from benchmarks.shapes import SHAPES, Shape, training_flops, training_flops_done
from verl.batch import ANCHOR_COEF
from verl.protocol import DataProto
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import Config
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker
from verl.workers.rollout import ROLLOUTS

# The anchored one is timed beside the plain one on the same batch; the teacher's answers, which it has in addition, are
# not counted among its tokens.
LOSSES = ("sft", "gspo", "gspo+anchor", "ranking")
WAYS = ("ours", "classic")
COLUMNS = (
    "loss", "way", "micro_tokens", "tokens", "seconds", "tokens_per_s", "mfu", "mfu_done", "peak_gib", "times_classic",
)  # fmt: skip
# What one micro-batch and one step hold on CPU.
TINY_TOKENS, TINY_STEP = 256, 1024


class NoRollout:
    """In the place of a generation engine where nothing is generated: it takes weights and drops them."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def wake(self) -> None:
        """Nothing sleeps."""

    def sleep(self) -> None:
        """Nothing is awake."""

    def push_weights(self, weights) -> None:
        """Every rank must come to the end of them."""
        for _ in weights:
            pass


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    result.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    result.add_argument("--data", choices=["answers", "documents"], default="answers",
                        help="prompts and answers of 64-511 tokens, or a loss over documents of 128-1023")  # fmt: skip
    result.add_argument("--tokens", nargs="+", type=int, default=[16384, 32768],
                        help="of a micro-batch; the classic way is timed with the first of them")  # fmt: skip
    result.add_argument("--step-tokens", type=int, default=131072, help="of the sequences of one optimizer step")
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    result.add_argument("--steps", type=int, default=5, help="steps that are timed")
    result.add_argument("--profile", action="store_true", help="trace one more step of ours: kernels and their kinds")
    return result


class UpdateBenchmark:
    """Times updates of workers that it builds, one at a time."""

    def __init__(self, args: argparse.Namespace, report: Report, folder):
        self.args, self.report, self.folder = args, report, folder
        self.shape: Shape = SHAPES[args.shape]
        self.lengths: Lengths = TINY if args.shape == "tiny" else {"answers": MIXED, "documents": DOCUMENTS}[args.data]
        self.limits = device_limits(args.device)

    def run(self) -> None:
        """All losses, ours first; the actor is built once for both of its losses."""
        for way in self.args.ways:
            budgets = self.args.tokens if way == "ours" else self.args.tokens[:1]
            for of_critic in (False, True):
                losses = [loss for loss in self.args.losses if (loss == "ranking") == of_critic]
                if losses:
                    self._time_worker(way, losses, budgets)
                    free_memory()

    def _time_worker(self, way: str, losses: list[str], budgets: list[int]) -> None:
        worker = None
        for loss in losses:
            batch = batch_of_tokens(self.shape, loss, self.args.n, self.lengths, self.args.step_tokens)
            for tokens in budgets:
                config = self._settings(loss, way, tokens, len(batch))
                if worker is None:
                    worker = self._build(loss, way, config)
                    say(f"built the {'critic' if loss == 'ranking' else 'actor'}, {way}")
                self._time(worker, loss, way, tokens, config, batch)

    def _settings(self, loss: str, way: str, tokens: int, prompts: int) -> Config:
        # The discriminator's classic batch is one of pairs.
        groups = prompts * self.args.n if loss == "ranking" and way == "classic" else prompts
        return compose(
            [
                f"stage={'seqkd' if loss == 'sft' else 'gad'}",
                *base_overrides(self.folder, self.args.device),
                "data.train_files=none",
                f"data.train_batch_size={groups}",
                f"data.max_prompt_length={self.lengths.prompt[1]}",
                f"data.max_response_length={self.lengths.answer[1]}",
                "actor_rollout_ref.rollout.name=none",
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
                f"critic.ppo_max_token_len_per_gpu={tokens}",
                *(fast_overrides(self.args.device) if way == "ours" else classic_overrides(tokens, self.lengths.width)),
            ]
        )

    def _build(self, loss: str, way: str, config: Config) -> ActorRolloutRefWorker | CriticWorker:
        common = {"device": self.args.device, "seed": 1, "total_steps": 1000}
        if loss == "ranking":
            role = ClassWithInitArgs(CriticWorker, config.critic, **common)
        else:
            role = ClassWithInitArgs(ActorRolloutRefWorker, config.actor_rollout_ref, use_reference=False, **common)
        with classic_models() if way == "classic" else nullcontext():
            worker = LocalWorkerGroup(role).worker
            worker.init_model()
        return worker

    def _time(self, worker, loss: str, way: str, tokens: int, config: Config, batch: DataProto) -> None:
        rows = rows_of(loss, batch)
        if loss == "ranking":
            data = as_pairs(batch) if way == "classic" else batch
            data.meta_info["mini_batches"] = 1
            worker.critic.config, update = config.critic, worker.update_critic
        else:
            data = first_look(batch) if way == "ours" else batch
            data.meta_info[ANCHOR_COEF] = 0.1 if loss == "gspo+anchor" else 0.0
            worker.actor.config, update = config.actor_rollout_ref.actor, worker.update_actor
        # Nothing of the classic way is compiled.
        warmup = self.args.warmup if way == "ours" else min(1, self.args.warmup)
        times = measure(self.args.device, lambda: update(data), warmup, self.args.steps)
        real, seconds = sum(rows.lengths()), times["seconds"]
        repeated = repeated_prompts(rows, batch)
        row = {
            "loss": loss, "way": way, "micro_tokens": tokens, "prompts": len(batch), "rows": len(rows), "tokens": real,
            "tokens_per_s": real / seconds, **times, **self._utilisation(loss, rows, seconds, repeated),
            "times_classic": None,
        }  # fmt: skip
        if way == "classic":
            self._compare(loss, tokens, seconds)
        if self.args.profile and way == "ours":
            row["profile"] = profile(self.args.device, lambda: update(data))
        self.report.add(**row)

    def _utilisation(self, loss: str, rows, seconds: float, repeated: list[int]) -> dict[str, float | None]:
        if self.limits is None:
            return {"mfu": None, "mfu_done": None}
        lengths, answered = rows.lengths(), int(rows.response_mask.sum())
        head = 1 if loss == "ranking" else self.shape.vocab
        done = training_flops_done(self.shape, lengths, answered, head, repeated)
        possible = seconds * self.limits.flops
        return {"mfu": training_flops(self.shape, lengths, repeated) / possible, "mfu_done": done / possible}

    def _compare(self, loss: str, tokens: int, classic_seconds: float) -> None:
        """Write into our rows how many times as fast as the classic way they were."""
        for row in self.report.rows:
            if row["loss"] == loss and row["way"] == "ours":
                row["times_classic"] = classic_seconds / row["seconds"]


def first_look(batch: DataProto) -> DataProto:
    """Without old log-probs, as the trainer passes a batch that makes one mini-batch: they are the update's own."""
    return batch.select([name for name in batch.batch.keys() if name != "old_log_probs"])  # noqa: SIM118


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    if args.shape == "tiny":
        args.tokens, args.step_tokens = [TINY_TOKENS], TINY_STEP
    ROLLOUTS["none"] = f"{__name__}.{NoRollout.__name__}"
    report = Report("update", args, COLUMNS)
    with model_folder(SHAPES[args.shape], args.device) as folder:
        say(f"wrote random models of shape {args.shape}")
        UpdateBenchmark(args, report, folder).run()
    return report.finish()


if __name__ == "__main__":
    main()
