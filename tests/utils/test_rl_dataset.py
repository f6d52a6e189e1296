import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from verl.utils.dataset import rl_dataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

# One token per word or Chinese character, so that ids and lengths can be counted by hand. Ids are positions here.
WORDS = ["<pad>", "<eos>", "<user>", "<system>", "<assistant>", "<unk>", "<bos>"]
WORDS += ["one", "two", "three", "four", "five", "six", "seven", "你", "好", "吗"]
PAD, EOS, USER, SYSTEM, ASSISTANT, ONE, TWO, THREE, FOUR, FIVE = 0, 1, 2, 3, 4, 7, 8, 9, 10, 11
NI, HAO, MA = 14, 15, 16
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if shout is defined %} one{% endif %}{% endif %}"
)


def make_tokenizer(pad="<pad>", eos="<eos>", template=TEMPLATE):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("[一-龥]", "isolated")]
    )
    from tokenizers import Regex, processors

    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")]
    )
    # A tokenizer that puts <bos> before everything unless add_special_tokens=False, as Llama's does.
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 6)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer
