"""A tiny base model that speaks the quick start's world but knows nothing of it, and the data to distil into it.

    python -m examples.quickstart.tiny_model --out DIR

writes DIR/base (model and tokenizer in Hugging Face format), the teacher's conversations as DIR/raw/train.json and
test.json, and what `verl.data_tools.convert` makes of them, DIR/train.parquet and DIR/test.parquet. The base is a Qwen2
of about a million parameters, trained for half a minute on plain sentences with random values. Left out: anything that
real training needs (several devices, mixed precision, checkpoints); that is what `verl` is for.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from examples.quickstart.world import Row, World
from verl.data_tools.convert.command import main as convert
from verl.models.loading import quiet_transformers

PAD, BOS_OF_TURN, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MAX_LENGTH = 512
WARMUP = 20  # steps
SAID_EVERY = 30  # steps, where there is no terminal for a bar
IGNORE = -100  # label of tokens without loss


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template, trained on `texts`.

    Words are split as in Qwen2, whose class transformers loads it with; while it is trained each Chinese character is a
    word of its own as well, so that a token never spans the end of a Chinese name. Any text survives encoding and
    decoding, since every byte is in the vocabulary.
    """
    family = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = family.normalizer, decoders.ByteLevel()
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([characters, family.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS_OF_TURN, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    bpe.train_from_iterator([*texts, *roles, *roles], trainer)
    bpe.pre_tokenizer = family.pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[BOS_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 384,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights in float32; the same seed gives the same weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,  # at this width, 0.02 makes learning to copy a name several times slower
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).float()
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(config, name))
    return model


def encode_row(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of the prompt (chat template, up to the assistant's turn) and of the answer, which ends with EOS."""
    prompt = tokenizer.apply_chat_template(row["content"], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(row["teacher_response"], add_special_tokens=False)["input_ids"]
    return prompt_ids, [*answer_ids, tokenizer.eos_token_id]


def collate(pairs: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each (B, T); labels are IGNORE outside the answer."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    input_ids = torch.full((len(pairs), length), pad_token_id)
    labels = torch.full((len(pairs), length), IGNORE)
    attention_mask = torch.zeros((len(pairs), length), dtype=torch.long)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        attention_mask[i, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> float:
    """Next-token training on the rows' answers (loss on the answer and its EOS only); returns the last step's loss.

    The learning rate rises over WARMUP steps and falls linearly to zero. Batches are drawn with replacement.
    """
    pairs = [encode_row(tokenizer, row) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps)
    )
    model.train()
    loss = torch.tensor(float("nan"))
    progress = trange(steps, desc="pre-training", unit="step", disable=None)
    for step in progress:
        picks = torch.randint(len(pairs), (batch_size,), generator=generator).tolist()
        loss = model(**collate([pairs[i] for i in picks], tokenizer.pad_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if progress.disable and (step + 1) % SAID_EVERY == 0:
            print(f"pre-training: {step + 1} of {steps} steps, loss {loss.item():.3f}", flush=True)
    model.eval()
    return loss.item()


def world_texts(world: World, seed: int = 0) -> list[str]:
    """Prompts and answers of the world, several draws of each prompt's answer, to train the tokenizer on."""
    n = 2 * len(world.prompts("train"))
    rows = world.teacher_rows("train", n, seed) + world.plain_rows(n, seed)
    return [text for row in rows for text in (row["content"][0]["content"], row["teacher_response"])]


def write_data(world: World, split: str, count: int, out: Path, seed: int) -> None:
    """A split's conversations as people export them, and as a dataset that trains."""
    exported = [
        {
            "conversations": [
                {"from": "human", "value": row["content"][0]["content"]},
                {"from": "gpt", "value": row["teacher_response"]},
            ]
        }
        for row in world.teacher_rows(split, count, seed)
    ]
    raw = out / "raw" / f"{split}.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps(exported, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    code = convert([str(raw), "--out", str(out / f"{split}.parquet"), "--overwrite"])
    if code:
        sys.exit(code)


def main() -> None:
    """Write the base model, its tokenizer and the data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the data and the weights")
    parser.add_argument("--pretrain_steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train_rows", type=int, default=960, help="960: each training prompt once")
    parser.add_argument("--test_rows", type=int, default=320, help="320: each test prompt once")
    args = parser.parse_args()

    quiet_transformers()
    world = World(args.seed)
    write_data(world, "train", args.train_rows, args.out, args.seed)
    write_data(world, "test", args.test_rows, args.out, args.seed)

    tokenizer = build_tokenizer(world_texts(world, args.seed))
    model = build_model(tokenizer, seed=args.seed)
    rows = world.plain_rows(args.batch_size * args.pretrain_steps, args.seed)
    loss = pretrain(model, tokenizer, rows, args.pretrain_steps, args.batch_size, args.lr, args.seed)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: base of {parameters:,} parameters, vocabulary {len(tokenizer)}, final loss {loss:.3f}")


if __name__ == "__main__":
    main()
