"""Reward models as discriminators: their head, and Hugging Face's own scores of whole unpadded rows."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BioGptConfig,
    BioGptForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from tests.tiny import SIZES, answer_rows, byte_tokenizer, write_model
from verl.models.answer_models import ScoreModel, score_head
from verl.models.finding import is_discriminator, refuse_discriminator
from verl.models.loading import check_labels, load_model
from verl.tools.score.model import check_critic

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
GPT2_SIZES = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
# GPT-2's, BioGPT's and GPT-NeoX's discriminators have another name for the head than their reward models.
FAMILIES = {
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config, SIZES),
    "llama": (LlamaForSequenceClassification, LlamaConfig, SIZES),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, GPT2_SIZES),
    "biogpt": (BioGptForSequenceClassification, BioGptConfig, SIZES),
    "gpt_neox": (GPTNeoXForSequenceClassification, GPTNeoXConfig, NEOX_SIZES),
}


def write(folder, family="qwen2", labels=1):
    model_class, config_class, sizes = FAMILIES[family]
    torch.manual_seed(3)
    model_class(config_class(**sizes, **ENDS, num_labels=labels)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_scores_are_hugging_faces(tmp_path, family):
    folder = write(tmp_path / family, family)
    own = load_model(folder, "score", fresh_head=False)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    head = score_head(own)
    assert torch.equal(head.weight, theirs.score.weight)
    assert head.bias is None or not head.bias.any()
    for name, weight in theirs.base_model.state_dict().items():
        assert torch.equal(own.base_model.state_dict()[name], weight), name
    rows = answer_rows([5, 5, 3, 8], [4, 2, 6, 1])
    values = ScoreModel(own)(rows)
    for row, (prompt, answer) in enumerate(rows.unpadded()):
        expected = theirs(torch.cat([prompt, answer])[None]).logits[0, 0]
        torch.testing.assert_close(values[row, len(answer) - 1], expected, atol=5e-6, rtol=1e-5)


def test_it_is_a_discriminator_and_no_language_model(tmp_path):
    folder = write(tmp_path / "m")
    assert is_discriminator(folder)
    check_labels(folder)
    check_critic(str(folder))
    with pytest.raises(ValueError, match="holds a reward model, and a language model is wanted"):
        refuse_discriminator(folder)
    with pytest.raises(ValueError, match="holds a reward model"):
        load_model(folder, "policy")


@pytest.mark.parametrize("labels", [2, 5])
def test_several_labels_are_refused(tmp_path, labels):
    """Two are what transformers says nothing of in config.json."""
    folder = write(tmp_path / "m", labels=labels)
    with pytest.raises(ValueError, match=f"expected a score head with one label, got {labels} labels"):
        check_labels(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"expected a score head with one label, got {labels} labels"):
        load_model(folder, "score")


def test_a_head_that_is_not_there_is_not_made_up(tmp_path):
    folder = write(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"says that it is a reward model, and has no head under score or classifier"):
        load_model(folder, "score")


def test_one_that_is_more_than_a_linear_head_is_refused(tmp_path):
    folder = write(tmp_path / "m")
    weights = load_file(folder / "model.safetensors") | {"gate.weight": torch.ones(1, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights more than a linear head on its backbone, e.g. \['gate.weight'\]"):
        load_model(folder, "score")
    # What is left of the language model that it was made from does not matter.
    weights = {name: tensor for name, tensor in weights.items() if name != "gate.weight"}
    save_file(
        weights | {"lm_head.weight": torch.ones(260, 32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    load_model(folder, "score")


def test_one_whose_own_code_computes_its_score_is_refused(tmp_path):
    folder = write(tmp_path / "m")
    file = folder / "config.json"
    own = {"auto_map": {"AutoModelForSequenceClassification": "modeling_gated.GatedForSequenceClassification"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(ValueError, match=r"its own code computes \(modeling_gated.GatedForSequenceClassification\)"):
        check_labels(folder)


def test_a_head_of_one_row_counts_where_the_config_is_silent(tmp_path):
    folder = write(tmp_path / "m")
    file = folder / "config.json"
    entries = json.loads(file.read_text())
    entries.pop("id2label"), entries.pop("label2id")
    file.write_text(json.dumps(entries))
    check_labels(folder)
    check_critic(str(folder))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_adapters_of_a_reward_model_bring_its_head(tmp_path, family):
    """As TRL's RewardTrainer leaves them, on a base that is a reward model: scores are PEFT's own."""
    base = write(tmp_path / "base", family)
    modules = ["q_proj", "v_proj"] if family == "qwen2" else ["c_attn"]
    config = LoraConfig(r=4, target_modules=modules, task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2")
    peft = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    peft.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    assert is_discriminator(tmp_path / "adapter")
    with pytest.raises(ValueError, match="a language model is wanted"):
        refuse_discriminator(tmp_path / "adapter")
    own = load_model(tmp_path / "adapter", "score", fresh_head=False).eval()
    ids = torch.tensor([[5, 9, 7, 1]])
    expected = peft.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
    torch.testing.assert_close(own(input_ids=ids).logits[0, -1, 0], expected, rtol=0, atol=2e-5)


def test_a_reward_model_of_a_class_of_its_own_is_refused(tmp_path):
    folder = write_model(tmp_path / "m")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["InternLM2ForRewardModel"]}))
    with pytest.raises(ValueError, match=r"class of its own \(InternLM2ForRewardModel\)"):
        load_model(folder, "score")
