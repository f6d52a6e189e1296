import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """This process as the only rank of a job that has its process group already, as the engine expects it.

    vLLM takes the group down when the process ends.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK"):
            environment.setenv(name, "0")
        file = tmp_path_factory.mktemp("rank") / "rendezvous"
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
        yield
