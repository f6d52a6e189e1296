"""What the engine's scheduler does at every step for every answer: all that vLLM's does, and as the trainer has it.

    python -m benchmarks.scheduling --shape 1.5b --out scheduling.json
    TORCHDYNAMO_DISABLE=1 python -m benchmarks.scheduling --device cpu --shape tiny --new-tokens 224

Both by one engine in turn; the model never writes EOS, and `same` says whether all answers were the same. `step` is the
time over the tokens of an answer, in milliseconds: that of all sequences' next token, the prompts' time spread over
them. On CPU it takes vLLM's CPU build, whose blocks have 128 tokens, and a shape so small that the scheduler is a large
part of a step.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from benchmarks.common import Report, parser, say, timed
from benchmarks.engines import engine_settings, random_prompts, start_engine
from benchmarks.inputs import model_folder
from benchmarks.shapes import SHAPES

COLUMNS = ("way", "sequences", "seconds", "step", "tokens_per_s", "of_vllms", "same")
WAYS = ("vLLM's", "lean")
ENGINE_SHARE = 0.5


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--prompts", type=int, default=128)
    result.add_argument("--prompt-tokens", type=int, default=256)
    result.add_argument("--n", type=int, default=8, help="answers per prompt, all at once")
    result.add_argument("--new-tokens", type=int, default=256)
    result.add_argument("--times", type=int, default=3, help="each; medians are told (default: 3)")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the trainer's")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    # vLLM is not everywhere where the command line is asked for.
    from verl.workers.rollout.vllm_rollout.scheduling import make_lean, make_whole, scheduler_of

    report = Report("scheduling", args, COLUMNS)
    sequences = args.prompts * args.n
    engine = ["actor_rollout_ref.rollout.name=vllm"]
    if args.device == "cpu":
        engine.append("actor_rollout_ref.rollout.enforce_eager=True")
    with model_folder(SHAPES[args.shape], args.device) as folder:
        sizes = (args.prompt_tokens, args.new_tokens, args.n, sequences)
        config = engine_settings(folder, args.device, *sizes, memory=ENGINE_SHARE, more=[*engine, *args.set])
        rollout, sampling = start_engine(config), config.actor_rollout_ref.rollout.sampling
        prompts = random_prompts(SHAPES[args.shape], args.prompts, args.prompt_tokens)
        scheduler = scheduler_of(rollout.llm)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        drawn: list[torch.Tensor] = []
        for number in range(args.times + 1):
            # Neither is always the first.
            for way in sorted(WAYS, reverse=bool(number % 2)):
                make_whole(scheduler)
                if way == "lean" and not make_lean(scheduler):
                    raise SystemExit("the scheduler or the cache of this model is of a kind that stays as it is")
                work = lambda: drawn.append(rollout.generate(prompts, sampling, 1, 0).batch["responses"])  # noqa: E731
                seconds[way].append(timed(args.device, work))
                say(f"{way}: {seconds[way][-1]:.2f} s{'' if number else ', not counted'}")
    same = all(torch.equal(drawn[0], answers) for answers in drawn)
    whole = median(seconds["vLLM's"][1:])
    for way, times in seconds.items():
        middle = median(times[1:])
        report.add(
            way=way, sequences=sequences, seconds=middle, step=1000 * middle / args.new_tokens,
            tokens_per_s=sequences * args.new_tokens / middle, of_vllms=middle / whole, same=same,
            all_seconds=times[1:],
        )  # fmt: skip
    return report.finish()


if __name__ == "__main__":
    main()
