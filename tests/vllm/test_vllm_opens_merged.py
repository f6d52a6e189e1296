"""A merged folder in vLLM, opened as anybody would: greedy answers, and where they end, are those of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import byte_tokenizer
from tests.vllm.tiny_engine import EOS, tiny_model
from verl.model_merger import merge
from verl.models.loading import hf_files, load_model
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

pytestmark = pytest.mark.vllm

# What the base model ends with, beside the tokenizer's, with which it was trained to end.
BASE_EOS = 2


def write_base(folder: Path) -> Path:
    """As version 4 of transformers wrote it, with positions and an EOS that are not the defaults."""
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    entries = json.loads((folder / "config.json").read_text())
    del entries["rope_parameters"], entries["dtype"]
    changed = {"rope_theta": 50.0, "eos_token_id": BASE_EOS, "torch_dtype": "float32", "transformers_version": "4.51.0"}
    (folder / "config.json").write_text(json.dumps(entries | changed))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": BASE_EOS}))
    return folder


def test_greedy_answers_end_where_those_of_transformers_do(tmp_path):
    base = write_base(tmp_path / "base")
    model = load_model(base, "policy")
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(model, optimizer, schedule, load_tokenizer(base), torch.float32, hf_files(base))
    manager.save_checkpoint(tmp_path / "checkpoint")
    merged = merge(tmp_path / "checkpoint", tmp_path / "merged")

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in (5, 17, 40, 90, 23, 61)]
    reference = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    expected = [
        reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    assert any(ids[-1] == EOS for ids in expected) and any(len(ids) == 8 for ids in expected)

    command = [sys.executable, str(Path(__file__).with_name("opened_by_vllm.py")), str(merged), json.dumps(prompts)]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("seen "))
    seen = json.loads(line.removeprefix("seen "))
    assert seen["answers"] == expected
    assert seen["ends"] == ["stop" if ids[-1] in (EOS, BASE_EOS) else "length" for ids in expected]
    assert seen["text"] == "<user>hi"
