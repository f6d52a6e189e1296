"""The judge's generation in a vLLM process of its own: greedy answers are those of transformers."""

import json

import pytest

from tests.tiny import byte_tokenizer, write_data
from tests.vllm.tiny_engine import tiny_model
from verl.tools.judge.__main__ import main

pytestmark = pytest.mark.vllm


def test_greedy_answers_are_those_of_transformers(tmp_path):
    data = write_data(tmp_path / "data.jsonl")
    students = []
    for seed in range(2):
        tiny_model(seed).save_pretrained(tmp_path / f"model{seed}")
        byte_tokenizer().save_pretrained(tmp_path / f"model{seed}")
        students += ["--student", f"m{seed}={tmp_path / f'model{seed}'}"]
    flags = ["--data", str(data), *students, "--temperature", "0", "--samples", "1", "--max_response_length", "8"]
    flags += ["--device", "cpu", "--gpu_memory_utilization", "0.15"]
    seen = {}
    for engine in ("hf", "vllm"):
        main([*flags, "--engine", engine, "--out", str(tmp_path / engine)])
        seen[engine] = [(tmp_path / engine / "answers" / f"m{seed}.jsonl").read_text() for seed in range(2)]
    assert seen["vllm"] == seen["hf"] and seen["hf"][0] != seen["hf"][1]
    cut = [json.loads(line)["cut"] for line in seen["vllm"][0].split("\n") if line]
    assert [True] in cut and [False] in cut
