"""Models with real head sizes and narrow everything else, on which the GPU's kernels can be compared with the CPU's."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.tiny import FAMILIES, answer_rows
from verl.models.packing import AnswerRows

# Head sizes, grouping and biases as in Qwen2.5-1.5B, Qwen3 and Llama 3.2.
SHAPES = {
    "qwen2": {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128},
    "qwen3": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "llama": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}
VOCAB = 1003  # odd, as nothing should depend on a round one


def language_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Three layers of the family's shape, random, on CPU."""
    config_class, model_class, _ = FAMILIES[family]
    heads = SHAPES[family]
    # Qwen2 derives the head size from the hidden size.
    hidden = heads["num_attention_heads"] * heads["head_dim"] if family == "qwen2" else 256
    config = config_class(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=512, num_hidden_layers=3,
        max_position_embeddings=2048, tie_word_embeddings=family == "qwen2", initializer_range=0.8 / hidden**0.5,
        pad_token_id=0, eos_token_id=1, **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class(config).to(dtype)


def mixed_rows() -> AnswerRows:
    """Rows from 2 to some 600 tokens."""
    rows = answer_rows([1, 37, 300, 5, 128, 64, 9], [1, 80, 300, 200, 1, 64, 33])
    return AnswerRows(rows.prompts % VOCAB, rows.prompt_mask, rows.responses % VOCAB, rows.response_mask)
