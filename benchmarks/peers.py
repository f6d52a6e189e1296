"""The same work by a peer, next to ours: an SFT update, and a whole GRPO step with KL and vLLM.

    pip install trl
    python -m benchmarks.peers --shape 1.5b --out peers.json
    python -m benchmarks.peers --shape 1.5b --peer verl --peer-path DIR --out peers_verl.json

`--peer trl` (default) is TRL; `--peer verl` is upstream verl, whose package has the name of ours: DIR is a folder with
its wheel and what it needs unpacked, which a process of its own finds and no other. All train fp32 weights in bf16 on
the same random model, with prompts and answers of the same lengths, no activation recomputed, and AdamW. TRL's SFT runs
on padded rows, drawn at random and grouped by length, which is the best it can do without flash-attn (`--trl-dtype
bfloat16` gives it bf16 weights and optimizer states, which ours does not have); its GRPO runs with vLLM in the same
process (`vllm_mode="colocate"`). Upstream verl runs on rows end to end and on padded ones (`--peer-rows`), with
flash-attn where it finds it and PyTorch's attention else: the column `attention` says which. Ours are
`benchmarks.update` and `benchmarks.step --algorithm grpo`. Rewards are the same rule, which costs nothing. Every run
gets a process of its own on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import peers_trl, peers_verl, step, update
from benchmarks.common import Report, in_processes, parser
from benchmarks.inputs import model_folder
from benchmarks.peers_common import STEP_TOKENS
from benchmarks.shapes import SHAPES

RUNS = ("ours-sft", "peer-sft", "ours-grpo", "peer-grpo")
PEERS = {"trl": peers_trl, "verl": peers_verl}
COLUMNS = (
    "task", "who", "attention", "seconds", "gen", "push", "push_share", "tokens", "tokens_per_s", "peak_gib",
    "times_peer",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--peer", choices=list(PEERS), default="trl")
    result.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    result.add_argument("--prompts", type=int, default=64, help="of one GRPO step")
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--tokens", type=int, default=32768, help="of a micro-batch of ours")
    result.add_argument("--trl-sft-rows", type=int, default=16, help="padded rows of a micro-batch of TRL's SFT")
    result.add_argument("--trl-grpo-rows", type=int, default=16, help="padded rows of a micro-batch of TRL's GRPO")
    result.add_argument("--trl-dtype", choices=["float32", "bfloat16"], default="float32", help="of TRL's weights")
    result.add_argument("--peer-path", type=Path, help="folder with upstream verl and what it needs")
    result.add_argument("--peer-rows", nargs="+", choices=["packed", "padded"], default=["packed", "padded"],
                        help="how upstream verl lays rows out, one run each")  # fmt: skip
    result.add_argument("--peer-tokens", type=int, default=16384, help="of a micro-batch of upstream verl's")
    result.add_argument("--peer-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for upstream verl")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    result.add_argument("--steps", type=int, default=3, help="steps that are timed")
    # What the processes of the single runs are told: loading upstream's libraries takes as long as a run.
    result.add_argument("--peer-checked", action="store_true", help=argparse.SUPPRESS)
    return result


def own_arguments(args: argparse.Namespace) -> list[str]:
    """What our benchmarks take over."""
    return [
        *("--shape", args.shape, "--device", args.device, "--ways", "ours", "--n", str(args.n)),
        *("--warmup", str(args.warmup), "--steps", str(args.steps)),
    ]


def ours_sft(args: argparse.Namespace, report: Report, models: Path) -> None:
    """SFT by `benchmarks.update`."""
    sizes = ["--tokens", str(args.tokens), "--step-tokens", str(STEP_TOKENS)]
    rows = update.main([*own_arguments(args), "--losses", "sft", *sizes])["results"]
    kept = {name: rows[0][name] for name in ("seconds", "tokens", "tokens_per_s", "peak_gib", "all_seconds", "mfu")}
    report.add(task="sft", who="ours", **kept)


def ours_grpo(args: argparse.Namespace, report: Report, models: Path) -> None:
    """GRPO by `benchmarks.step`."""
    sizes = ["--prompts", str(args.prompts), "--tokens", str(args.tokens)]
    (row,) = step.main([*own_arguments(args), *sizes, "--algorithm", "grpo"])["results"]
    kept = {name: row[name] for name in ("gen", "tokens_per_s", "peak_gib", "all_seconds", "response_length")}
    report.add(
        task="grpo", who="ours", seconds=row["step"], tokens=row["tokens_per_s"] * row["step"],
        push=row["push_weights"], push_share=row["push_weights"] / row["step"], **kept,
    )  # fmt: skip


def compare(report: Report) -> None:
    """Write into our rows how many times as fast as the peer's best they were, in tokens per second."""
    for task in ("sft", "grpo"):
        rows = [row for row in report.rows if row["task"] == task and row["tokens_per_s"] is not None]
        theirs = [row["tokens_per_s"] for row in rows if row["who"] != "ours"]
        for row in rows:
            if row["who"] == "ours" and theirs:
                row["times_peer"] = row["tokens_per_s"] / max(theirs)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    peer = PEERS[args.peer]
    if args.warmup < 1:
        arguments().error("--warmup must be at least 1: when a peer's first step begins is not noted")
    if any(run.startswith("peer") for run in args.runs) and not args.peer_checked:
        peer.check(args)
    report = Report("peers", args, COLUMNS)
    if args.peer_path is not None:
        report.head["versions"] |= peers_verl.versions(args.peer_path)
    if args.device == "cuda" and len(args.runs) > 1:
        # What an engine leaves on the device must not stand in the next one's way.
        given = sys.argv[1:] if argv is None else argv
        in_processes("benchmarks.peers", [*given, "--peer-checked"], "--runs", args.runs, report)
    else:
        runs = {"ours-sft": ours_sft, "ours-grpo": ours_grpo, "peer-sft": peer.sft, "peer-grpo": peer.grpo}
        for run in args.runs:
            with model_folder(SHAPES[args.shape], args.device) as models:
                runs[run](args, report, models)
    compare(report)
    return report.finish()


if __name__ == "__main__":
    main()
