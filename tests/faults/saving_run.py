"""A run whose model is a number, and whose loop, checkpoints and files are real: `saving_run.py FOLDER STEPS KEEP`."""

import sys
from pathlib import Path

from tests.trainer.ppo.test_best import Trainer

# Step 2 validates best, step 3 does not.
VALUES = [0.1, 0.2, 0.9, *[0.3] * 100]


def main(folder: str, steps: int, keep: int) -> None:
    Trainer(
        Path(folder), VALUES[: steps + 1], save_freq=1, max_actor_ckpt_to_keep=keep, max_critic_ckpt_to_keep=keep
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
