"""A tiny base student that knows the grammar world's words but not its rules, facts or probabilities, and the data.

    python -m examples.grammar_world.build --out DIR [--seed 0]

writes DIR/base (a Qwen2 of 140 thousand parameters and its tokenizer, in Hugging Face format), DIR/train.parquet
and DIR/test.parquet. The base is trained from scratch on plain answers, in half a minute.
"""

import argparse
from pathlib import Path

from examples.grammar_world.world import World
from examples.quickstart.tiny_model import build_model, build_tokenizer, pretrain
from verl.data_tools.writing import write_rows

TRAIN_ROWS = 3072  # each training prompt sixteen times, each time with an answer of its own
PRETRAIN_STEPS = 300
BATCH_SIZE = 64
PRETRAIN_LR = 3e-3


def build(out: Path, seed: int = 0, *, train_rows: int = TRAIN_ROWS, pretrain_steps: int = PRETRAIN_STEPS) -> World:
    """Write the base and the data of the world of this seed under `out`, and return the world."""
    world = World(seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "train.parquet", world.teacher_rows("train", train_rows, seed))
    write_rows(out / "test.parquet", world.teacher_rows("test", len(world.prompts("test")), seed))

    tokenizer = build_tokenizer(world_texts(world))
    model = build_model(tokenizer, hidden_size=64, num_layers=2, intermediate_size=192, seed=seed)
    rows = world.plain_rows(BATCH_SIZE * pretrain_steps, seed)
    pretrain(model, tokenizer, rows, pretrain_steps, BATCH_SIZE, PRETRAIN_LR, seed)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    return world


def world_texts(world: World) -> list[str]:
    """All prompts, and enough answers that each form of each word occurs, to train the tokenizer on."""
    prompts = world.prompts("train") + world.prompts("test")
    rows = world.plain_rows(4000, seed=0) + world.teacher_rows("train", 4000, seed=0)
    return prompts + [row["teacher_response"] for row in rows]


def main() -> None:
    """Write the base model, its tokenizer and the data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the data and the weights")
    parser.add_argument("--train_rows", type=int, default=TRAIN_ROWS, help="192: each training prompt once")
    parser.add_argument("--pretrain_steps", type=int, default=PRETRAIN_STEPS)
    args = parser.parse_args()
    build(args.out, args.seed, train_rows=args.train_rows, pretrain_steps=args.pretrain_steps)
    print(f"{args.out}: base, train.parquet, test.parquet")


if __name__ == "__main__":
    main()
