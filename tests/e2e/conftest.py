import pytest

from tests.tiny import write_data, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with training and validation data."""
    path = tmp_path_factory.mktemp("e2e")
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    return path
