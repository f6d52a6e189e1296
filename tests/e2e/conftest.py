import pytest
import torch.distributed as dist

from tests.e2e.running import train
from tests.tiny import write_data, write_model
from verl.trainer.in_process import run_in_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with training and validation data."""
    path = tmp_path_factory.mktemp("e2e")
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    return path


@pytest.fixture(scope="module")
def run(folder):
    """`run(name, *overrides, steps=3)`: GAD from scratch on one rank in this process, the actor frozen in step 0.
    Returns the run's folder."""

    def start(name, *overrides, steps=3):
        return train(
            folder,
            name,
            "stage=warmup",
            "trainer.critic_warmup=1",
            f"trainer.total_training_steps={steps}",
            f"critic.model.path={folder}/base",
            "critic.optim.lr=1e-3",
            "trainer.test_freq=-1",
            "trainer.val_before_train=False",
            *overrides,
            run_with=run_in_process,
        )

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
