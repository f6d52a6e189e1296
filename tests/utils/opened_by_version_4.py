"""Child of test_open_elsewhere, run with transformers 4 before version 5 on the path: opens folders, says what it saw.

python opened_by_version_4.py FOLDER... : writes FOLDER/seen.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, GenerationConfig

IDS = [list(range(3, 43)), list(range(60, 20, -1))]
TEXT = "Say 123, 什么颜色?"


def look(folder: Path) -> dict:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    scores = architecture.endswith("ForTokenClassification")
    auto = AutoModelForTokenClassification if scores else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    seen = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "eos in config": model.config.eos_token_id,
    }
    with torch.no_grad():
        seen["logits"] = model.eval().float()(torch.tensor(IDS)).logits.tolist()
    if not scores:
        seen["eos"] = GenerationConfig.from_pretrained(folder).eos_token_id
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        seen["ids"] = tokenizer(TEXT)["input_ids"]
        seen["template"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        seen["special"] = [tokenizer.eos_token, tokenizer.pad_token]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        (Path(name) / "seen.json").write_text(json.dumps(look(Path(name))))
