"""The training rows in batches: how many steps they make, and which rows each step gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, Dataset

from verl.batch import Prompts
from verl.config.run import Config, DataConfig
from verl.protocol import DataProto
from verl.utils.dataset.sampler import EpochBatches
from verl.utils.stalls import doing
from verl.utils.units import counted

logger = logging.getLogger(__name__)


def count_steps(config: Config, rows: int) -> int:
    """The steps of a run on so many training rows; ValueError if they fill no batch."""
    batch, epochs = config.data.train_batch_size, config.trainer.total_epochs
    steps = config.trainer.total_training_steps or rows * epochs // batch
    if steps == 0:
        raise ValueError(
            f"{rows} training rows times {epochs} epochs do not fill one batch of {batch}: lower "
            "data.train_batch_size or raise trainer.total_epochs"
        )
    return steps


def tell_steps(config: Config, rows: int) -> int:
    """`count_steps`, said; and a warning if none of them trains the actor."""
    steps, batch = count_steps(config, rows), config.data.train_batch_size
    logger.info(
        "%s, batches of %d: %s, %.2f epochs",
        counted(rows, "training row"), batch, counted(steps, "step"), steps * batch / rows,
    )  # fmt: skip
    if config.frozen_actor_steps >= steps:
        logger.warning(
            "trainer.critic_warmup=%s covers all %d steps: only the discriminator will be trained",
            config.trainer.critic_warmup, steps,
        )  # fmt: skip
    return steps


def batches_of(
    rows: Dataset, collate_fn: Callable[[list], dict], data: DataConfig, count: int, samples_seen: int
) -> Iterator[Prompts]:
    """So many batches, from the first row not seen yet on.

    Args:
        collate_fn: makes one dict of tensors and object arrays of a list of rows.
        samples_seen: rows of earlier steps.
    """
    sampler = EpochBatches(
        rows=len(rows),
        batch_size=data.train_batch_size,
        batches=count,
        seed=data.seed if data.shuffle else None,
        start=samples_seen,
    )
    loader = DataLoader(
        rows,
        batch_sampler=sampler,
        num_workers=data.dataloader_num_workers,
        collate_fn=collate_fn,
    )
    batches = iter(loader)
    while True:
        with doing("reading the next batch"):
            batch = next(batches, None)
        if batch is None:
            return
        yield Prompts.of(DataProto.from_single_dict(batch))
