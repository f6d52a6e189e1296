import pytest

from tests.tiny import write_data, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with training data."""
    path = tmp_path_factory.mktemp("faults")
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=18)
    return path
