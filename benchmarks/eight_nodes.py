"""A GAD step on several nodes, computed on paper: measured rates of one GPU, nominal rates of links, the bytes that the
code moves. Nothing is run.

    python -m benchmarks.eight_nodes
    python -m benchmarks.eight_nodes --shape 7b --batch 1024 --nics 1

Student, discriminator and reference have one shape, the LM head counted in each. A prompt has `--prompt` tokens;
answers, teachers' too, are spread evenly from 0 to `--longest` tokens, half of it on average, and padded to it where
they travel. `docs/nodes.md` has the table, and says which rates were measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from benchmarks.shapes import SHAPES, Shape, decode_limit_seconds, training_flops
from verl.models.shape import LIMITS

# Measured on one H200 with 1.5B (benchmarks/README.md): the updates' MFU, with micro-batches of 16k and 32k tokens; on
# the fastest and the slowest of three hosts what a decode step of 512 sequences took beyond its limit, (2.20 - 0.45) s
# and (3.71 - 0.45) s over 256 steps; the slowest host's push.
MFU = {"actor": 0.439, "critic": 0.526}
DECODE_BEYOND_S, PUSH_S = {"fastest": 0.0068, "slowest": 0.0127}, 0.31
# Nominal bytes per second in one direction: NVLink (900 GB/s counts both), InfiniBand of 400 Gbit/s.
NVLINK, NIC = 450e9, 50e9
BUDGET = {"actor": 16_384, "critic": 32_768}  # tokens of a micro-batch, the presets'
ANSWERS, CHECKED, STRETCHES = 8, 2, 16
LIMIT = LIMITS["NVIDIA H200"]


@dataclass(frozen=True)
class Cluster:
    """`share`: of the links' rates, that collectives reach; `hop`: seconds from rank to rank; `driver`: its bytes/s."""

    nodes: int = 8
    gpus: int = 8
    nics: float = 8
    share: float = 0.7
    hop: float = 5e-6
    driver: float = 1e9

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def over_all(self, size: float, calls: int) -> float:
        """Seconds of `calls` ring all-gathers or reduce-scatters of `size` bytes together, on all NICs of a node."""
        slowest = min(self.nics * NIC, NVLINK) if self.nodes > 1 else NVLINK
        return size * (self.ranks - 1) / self.ranks / (slowest * self.share) + calls * (self.ranks - 1) * self.hop

    def in_node(self, size: float, calls: int) -> float:
        """The same among the ranks of one node."""
        return Cluster(1, self.gpus, self.nics, self.share, self.hop).over_all(size, calls)

    def between_nodes(self, size: float, calls: int) -> float:
        """Seconds of ring all-reduces of every rank's shard of `size` bytes with its like on the other nodes."""
        moved = 2 * (self.nodes - 1) / self.nodes * size * self.gpus
        return moved / (self.nics * NIC * self.share) + calls * 2 * (self.nodes - 1) * self.hop


def fsdp_seconds(shape: Shape, cluster: Cluster, micro_batches: int, hybrid: bool = False) -> float:
    """Communication of an update: for every micro-batch layers in bf16 before forward and backward, what is outside
    them once; fp32 gradients once. `hybrid`: sharded within a node, whose shards' gradients are summed over nodes."""
    gathered, calls = 2 * (shape.body_parameters + shape.parameters), 2 * shape.layers + 1
    gradients, reduced = 4 * shape.parameters, shape.layers + 1
    if not hybrid:
        return micro_batches * cluster.over_all(gathered, calls) + cluster.over_all(gradients, reduced)
    own = micro_batches * cluster.in_node(gathered, calls) + cluster.in_node(gradients, reduced)
    return own + cluster.between_nodes(gradients / cluster.gpus, reduced)


def decode_limit(shape: Shape, sequences: int, prompt: int, longest: int) -> float:
    """The least seconds until the last of a GPU's answers ends; as many end in every stretch of the steps."""
    steps = longest // STRETCHES
    alive = [ceil(sequences * (1 - part / STRETCHES)) for part in range(STRETCHES)]
    parts = ([prompt + part * steps] * count for part, count in enumerate(alive))
    return sum(decode_limit_seconds(shape, LIMIT, contexts, steps, len(contexts)) for contexts in parts)


def row_bytes(prompt: int, longest: int, checked: float) -> float:
    """Bytes of a prompt with its answers to the ranks and back in a step: ids and masks of 8 bytes, values of 4, all as
    wide as they may be. `checked`: the share of prompts whose log-probs are computed to compare the engine's."""
    prompts, students, values = 16 * prompt, 16 * ANSWERS * longest, 4 * ANSWERS * longest
    teacher = 8 * longest + 8 * (prompt + longest)
    generate = prompts + students + values
    critic = prompts + teacher + students
    check, reference = prompts + students + 2 * values, prompts + students + values
    actor = prompts + students + teacher + 2 * values
    return generate + critic + checked * check + reference + actor


def plan(shape: Shape, cluster: Cluster, batch: int, prompt: int, longest: int, widest: int) -> dict[str, float]:
    """Figures of a step; an update takes the longer of computing and FSDP. ValueError: what does not divide."""
    prompts, mean = batch // cluster.ranks, longest // 2
    for name, value, by in (("batch", batch, cluster.ranks), ("longest", longest, STRETCHES)):
        if value < by or value % by:
            raise ValueError(f"--{name}: expected a multiple of {by}, got {value}")
    group = [prompt + mean] * (ANSWERS + 1)
    flops = training_flops(shape, group * prompts, [prompt] * ANSWERS * prompts)
    forward = training_flops(shape, group[1:] * prompts, [prompt] * (ANSWERS - 1) * prompts) / 3
    tokens, checked = prompts * (prompt + (ANSWERS + 1) * mean), min(1, CHECKED / prompts)
    limit = decode_limit(shape, prompts * ANSWERS, prompt, longest)
    generate = {host: limit + longest * seconds for host, seconds in DECODE_BEYOND_S.items()}
    figures: dict[str, float] = {"prompts a GPU": prompts, "tokens a GPU in an update": tokens}
    figures |= {f"generation, {host} host": seconds for host, seconds in generate.items()}
    # A layer has 12 tensors, gathered one by one.
    figures["push"] = PUSH_S + cluster.over_all(2 * shape.parameters, 12 * shape.layers + 3)
    for name in ("critic", "actor"):
        micro_batches = ceil(tokens / BUDGET[name])
        figures[f"{name} update, computing"] = flops / (MFU[name] * LIMIT.flops)
        figures[f"{name} update, FSDP"] = fsdp_seconds(shape, cluster, micro_batches)
        figures[f"{name} update, HSDP"] = fsdp_seconds(shape, cluster, micro_batches, hybrid=True)
    figures["sync check"] = checked * forward / (MFU["actor"] * LIMIT.flops)
    figures["reference"] = forward / (MFU["actor"] * LIMIT.flops)
    figures["driver"] = batch * row_bytes(widest, longest, checked) / cluster.driver
    updates = sum(max(figures[f"{n} update, computing"], figures[f"{n} update, FSDP"]) for n in ("critic", "actor"))
    rest = updates + sum(figures[name] for name in ("push", "sync check", "reference", "driver"))
    figures |= {f"step, {host} host": seconds + rest for host, seconds in generate.items()}
    return figures | {"models' share of it, %": 100 * (updates + figures["reference"]) / figures["step, slowest host"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["1.5b", "7b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[256, 2048], help="prompts per step")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--widest", type=int, default=2048, help="data.max_prompt_length (default: 2048)")
    parser.add_argument("--longest", type=int, default=1536, help="data.max_response_length (default: 1536)")
    for name, default in vars(Cluster()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"see Cluster (default: {default})")
    args = parser.parse_args(argv)
    cluster = Cluster(**{name: getattr(args, name) for name in vars(Cluster())})
    cases = [(shape, batch) for shape in args.shape for batch in args.batch]
    try:
        plans = [plan(SHAPES[s], cluster, batch, args.prompt, args.longest, args.widest) for s, batch in cases]
    except ValueError as error:
        parser.error(str(error))
    print("| seconds | " + " | ".join(f"{shape}, {batch:,}" for shape, batch in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for name in plans[0]:
        cells = (f"{p[name]:,.0f}" if p[name] >= 100 else f"{p[name]:.2g}" for p in plans)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
