"""The type that a merged model is written in: rounded once from training's, tied where it was, compared to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.tiny import byte_tokenizer, causal_lm, scorer
from verl.model_merger.cli import main
from verl.model_merger.merger import load_checkpoint_model
from verl.models.loading import hf_files, load_model
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager


def checkpoint(folder: Path, model, kind: str) -> dict[str, torch.Tensor]:
    """A checkpoint of weights that bf16 and fp16 cannot hold exactly; returns them."""
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    trained = load_model(folder / "base", kind)
    optimizer = torch.optim.AdamW(trained.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    tokenizer, files = load_tokenizer(folder / "base"), hf_files(folder / "base", None)
    manager = FSDPCheckpointManager(trained, optimizer, schedule, tokenizer, torch.float32, files)
    manager.save_checkpoint(folder / "global_step_1" / kind)
    return {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}


def run(command: str, folder: Path, kind: str, *flags: str) -> None:
    where = {"merge": "--target_dir", "test": "--test_hf_dir"}[command]
    local = str(folder / "global_step_1" / kind)
    main([command, "--backend", "fsdp", "--local_dir", local, where, str(folder / "hf"), *flags])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("what", ["tied", "untied", "critic"])
def test_every_weight_is_rounded_once_and_the_test_says_so(tmp_path, capsys, what, dtype):
    kind = "score" if what == "critic" else "policy"
    model = scorer() if what == "critic" else causal_lm(tied=what == "tied")
    trained = checkpoint(tmp_path, model, kind)
    # The default is bf16.
    run("merge", tmp_path, kind, *([] if dtype == "bfloat16" else ["--dtype", dtype]))
    said = capsys.readouterr().out
    assert f" parameters in {dtype}, " in said and ("convert_hf_to_gguf.py" in said) == (kind == "policy")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (what == "untied")
    wanted = getattr(torch, dtype)
    assert all(torch.equal(tensor, trained[name].to(wanted)) for name, tensor in stored.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    auto = AutoModelForTokenClassification if kind == "score" else AutoModelForCausalLM
    opened = auto.from_pretrained(tmp_path / "hf")
    assert {parameter.dtype for parameter in opened.parameters()} == {wanted}
    if kind == "policy":
        assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == (what == "tied")

    run("test", tmp_path, kind, "--dtype", dtype)
    assert f"are equal in {dtype}, to the bit" in capsys.readouterr().out
    other = "float16" if dtype != "float16" else "float32"
    with pytest.raises(SystemExit, match=f"holds weights in {dtype}, not in {other}"):
        run("test", tmp_path, kind, "--dtype", other)
    # The least change of one number is one too many.
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    bits = stored[name].view(torch.int32 if dtype == "float32" else torch.int16)
    bits[0, 0] ^= 1
    save_file(stored, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"differs from .* in 1 tensors, e\.g\..*q_proj"):
        run("test", tmp_path, kind)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = causal_lm()
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    checkpoint(tmp_path, model, "policy")
    with pytest.raises(SystemExit, match=r"model\.norm\.weight has values beyond float16: .*--dtype bfloat16"):
        run("merge", tmp_path, "policy", "--dtype", "float16")
    assert not (tmp_path / "hf").exists()
    run("merge", tmp_path, "policy")


def test_a_smaller_model_over_a_larger_one(tmp_path):
    """fp32 in several files would be read beside bf16 in one."""
    checkpoint(tmp_path, causal_lm(), "policy")
    run("merge", tmp_path, "policy", "--dtype", "float32")
    run("merge", tmp_path, "policy")
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors*")] == ["model.safetensors"]
    run("test", tmp_path, "policy", "--dtype", "bfloat16")


@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_a_checkpoint_that_does_not_say_how_it_was_trained(tmp_path, instead):
    checkpoint(tmp_path, causal_lm(), "policy")
    file = tmp_path / "global_step_1" / "policy" / "fsdp_config.json"
    file.unlink()
    if instead == "a folder":
        file.mkdir()
    with pytest.raises(FileNotFoundError, match=r"fsdp_config\.json is missing, or no file: copy the checkpoint again"):
        load_checkpoint_model(file.parent)
