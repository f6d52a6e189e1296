"""Code that comes with a model runs where it was asked for, and nowhere else."""

import json
import pickle

import pytest

from tests.tiny import write_model
from verl.models.loading import load_config, load_model
from verl.models.tokenizer import load_tokenizer

CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_does_not_run(tmp_path, file):
    model, mark = write_model(tmp_path / "model"), tmp_path / "ran"
    (model / "mine.py").write_text(CODE.format(str(mark)))
    names = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", "mine.T"]}
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | {"auto_map": names}))
    load_config(model, "policy")
    load_model(model, "policy")
    load_tokenizer(model)
    assert not mark.exists()


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (CODE.format(str(self.mark)),)


def test_a_pickle_for_weights_does_not_run(tmp_path):
    model, mark = write_model(tmp_path / "model"), tmp_path / "ran"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_model(model, "policy")
    assert not mark.exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "it would have"
