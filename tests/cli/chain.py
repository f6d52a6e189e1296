"""A model whose next token is a function of the last one alone: what it answers is known beforehand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import VOCAB, byte_tokenizer


def chain_model(steps: dict[int, int], context: int = 256) -> LlamaForCausalLM:
    """A language model that goes from token to token as `steps` say, and from any other one to EOS (1)."""
    width = 264
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=context, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Nothing is added to the embedding on its way up.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, width))
        model.lm_head.weight.zero_()
        for last in range(VOCAB):
            model.lm_head.weight[steps.get(last, 1), last] = 100.0
    return model


def write_chain(folder: Path, answer: str, context: int = 256, endless: bool = False) -> Path:
    """A folder with a model that gives one answer to everything, whose bytes all differ; over and over if `endless`."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    path = [tokenizer.convert_tokens_to_ids("<bot>"), *ids]
    steps = dict(pairwise(path)) | ({ids[-1]: ids[0]} if endless else {})
    chain_model(steps, context).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
