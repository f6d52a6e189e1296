"""Rows of words, their files and their tokenizer: what a test of the dataset can work out by hand."""

import json
from types import SimpleNamespace

import pandas as pd
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# One token per word or Chinese character, so that ids and lengths can be worked out by hand: ids are positions here.
WORDS = [
    "<pad>",
    "<eos>",
    "<user>",
    "<system>",
    "<assistant>",
    "<unk>",
    "<bos>",
    "one",
    "two",
    "three",
    "你",
    "好",
    "吗",
]
PAD, EOS, USER, SYSTEM, ASSISTANT, UNK, BOS, ONE, TWO, THREE, NI, HAO, MA = range(13)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think is defined %} {{ think }}{% endif %}{% endif %}"
)


def make_tokenizer(pad="<pad>", eos="<eos>", template=TEMPLATE):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    chinese = pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), chinese])
    # <bos> goes before everything unless add_special_tokens=False, as with Llama's tokenizer.
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def make_config(**changes):
    settings = {
        "prompt_key": "content",
        "response_key": "teacher_response",
        "max_prompt_length": 6,
        "max_response_length": 5,
        "truncation": "error",
        "filter_overlong_prompts": False,
        "filter_overlong_prompts_workers": None,
        "on_bad_row": "error",
        "return_raw_chat": False,
        "apply_chat_template_kwargs": {},
    }
    return SimpleNamespace(**(settings | changes))


def make_row(prompt="one two", answer="你好 three", **more):
    return {"content": [{"role": "user", "content": prompt}], "teacher_response": answer, **more}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)
    return path
