"""What tests of sharded models share."""

import pytest
import torch.distributed as dist


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    left = dist.is_initialized()  # by tests before these
    if not left:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    if not left:
        dist.destroy_process_group()
