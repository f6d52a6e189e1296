"""What a model is known by."""

import json
import os
import shutil

import pytest

from tests.adapters import write_peft_folder
from tests.tiny import causal_lm, write_model
from verl.tools.judge.kept import model_content


def test_wherever_a_model_lies_it_is_the_same(tmp_path):
    folder = write_model(tmp_path / "m")
    known = model_content(folder)
    shutil.copytree(folder, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, (1, 1))
    (tmp_path / "copy" / "judge.json").write_text("{}")
    assert model_content(tmp_path / "copy") == known


@pytest.mark.parametrize("changed", ["weights", "config", "ends", "code"])
def test_what_makes_another_model(tmp_path, changed):
    folder = write_model(tmp_path / "m")
    known = model_content(folder)
    if changed == "weights":
        write_model(folder, seed=1)
    elif changed == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    elif changed == "ends":
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    else:
        (folder / "modeling_x.py").write_text("")
    assert model_content(folder) != known


@pytest.mark.parametrize("changed", ["base", "scale"])
def test_adapters_are_known_with_their_base(tmp_path, changed):
    base, folder = write_model(tmp_path / "base"), tmp_path / "adapters"
    write_peft_folder(folder, base, causal_lm())
    known = model_content(folder)
    if changed == "base":
        write_model(base, seed=1)
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert model_content(folder) != known
