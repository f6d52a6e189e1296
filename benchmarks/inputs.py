"""What a benchmark runs on: random models in a folder, batches of random tokens, and the settings to train with."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.shapes import BF16_BYTES, Shape
from verl.batch import student_rows, teacher_rows
from verl.models.packing import AnswerRows
from verl.protocol import DataProto
from verl.trainer.config import Config, compose_config

PAD, EOS, FIRST_TEXT_ID = 0, 1, 4
MEMORY_FOLDER = Path("/dev/shm")
# Room for files beside the weights.
SPARE_BYTES = 2**28
INIT_STD = 0.02
# See `_forbid_eos`: how far the hidden states are moved, and the weight with which EOS looks at that.
EOS_SHIFT, EOS_WEIGHT = 1.0, 128.0

# ---------------------------------------------------------------------------------------------------------------------
# Models


def in_memory(size: int) -> Path | None:
    """Where to make temporary folders of `size` bytes: in memory where there is room; None: where the system has its
    own."""
    room = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > size + SPARE_BYTES
    return MEMORY_FOLDER if room else None


@contextmanager
def model_folder(shape: Shape, device: str) -> Iterator[Path]:
    """A temporary folder with `policy` and `critic`, random models of the shape; in memory where there is room."""
    place = in_memory(BF16_BYTES * shape.parameters)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=place) as name:
        folder = Path(name)
        write_policy(shape, folder / "policy", device)
        write_critic(folder / "policy", folder / "critic")
        yield folder


def write_policy(shape: Shape, folder: Path, device: str, seed: int = 0) -> None:
    """A Qwen2 language model with random bf16 weights that never ends an answer, and its tokenizer."""
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        rope_theta=1e6,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(_random_weights(config, shape, device, seed), folder / "model.safetensors", metadata={"format": "pt"})
    if device == "cuda":
        # Ranks of their own will want it.
        torch.cuda.empty_cache()
    word_tokenizer(shape.vocab).save_pretrained(folder)


def write_critic(policy: Path, folder: Path) -> None:
    """A discriminator that shares the policy's weight file and gets a fresh score head when it is loaded."""
    folder.mkdir()
    for source in policy.resolve().iterdir():
        (folder / source.name).symlink_to(source)
    config = json.loads((policy / "config.json").read_text())
    (language_model,) = config["architectures"]
    classes = [language_model.replace("ForCausalLM", "ForTokenClassification")]
    config |= {"architectures": classes, "num_labels": 1}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def _random_weights(config: Qwen2Config, shape: Shape, device: str, seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        named = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, meta in named.items():
        tensor = torch.zeros(meta.shape, dtype=torch.bfloat16, device=device)
        if meta.dim() > 1:
            tensor.normal_(std=INIT_STD, generator=generator)
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)
        weights[name] = tensor
    _forbid_eos(weights, shape)
    return weights


def _forbid_eos(weights: dict[str, torch.Tensor], shape: Shape) -> None:
    """Make EOS practically impossible, so that every answer runs to its limit, whichever engine writes it.

    Attention weights add up to 1, so the first layer's value bias moves every hidden state by one constant. It goes
    into a single coordinate that no other weight writes to, and of all rows of the LM head only that of EOS reads it,
    with a negative sign. The other tokens' logits stay random.
    """
    coordinate, of_group = shape.hidden - 1, slice(0, shape.hidden // shape.kv_heads, shape.head_dim)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[coordinate] = 0
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight[:, coordinate] = 0
            weight[EOS] = 0
    # Value 0 of the first key-value head is 1 at every token, and the queries of its group pass it on.
    attention = "model.layers.0.self_attn."
    weights[attention + "v_proj.weight"][0] = 0
    weights[attention + "v_proj.bias"][0] = 1
    weights[attention + "o_proj.weight"][coordinate, of_group] = EOS_SHIFT * shape.kv_heads / shape.heads
    weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"][EOS, coordinate] = -EOS_WEIGHT


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per byte when it reads; the rest of the vocabulary are made-up words that only a model writes.

    So the length of a text in tokens is known beforehand, and turning a model's tokens into text is the work it is with
    a real vocabulary.
    """
    special = ["<pad>", "<eos>", "<user>", "<bot>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    # ByteLevel writes a space as this letter. One place is left: transformers gives every Qwen2 tokenizer a token more.
    pieces += [f"Ġw{number}" for number in range(vocab - len(pieces) - 1)]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
        chat_template=template,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and of answers, drawn uniformly between the two numbers, both included."""

    prompt: tuple[int, int]
    answer: tuple[int, int]

    @property
    def width(self) -> int:
        """Of a row that holds the longest of both."""
        return self.prompt[1] + self.answer[1]


MIXED = Lengths((64, 511), (64, 511))
# Loss on every token but the first.
DOCUMENTS = Lengths((1, 1), (127, 1022))
TINY = Lengths((4, 15), (4, 15))


def random_batch(shape: Shape, prompts: int, answers: int, lengths: Lengths, seed: int = 0) -> DataProto:
    """Random tokens as the trainer's batches hold them: B prompts, each with a teacher's answer and N of the student.

    Old and reference log-probs lie about those of a random model, which is nearly uniform over the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, bounds: tuple[int, int], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        length = torch.randint(bounds[0], bounds[1] + 1, (count, 1), generator=generator)
        mask = (torch.arange(bounds[1]) < length).long()
        mask = mask.flip(-1) if left else mask
        return torch.randint(FIRST_TEXT_ID, shape.vocab, mask.shape, generator=generator) * mask, mask

    input_ids, attention_mask = rows(prompts, lengths.prompt, left=True)
    teacher, teacher_mask = rows(prompts, lengths.answer, left=False)
    responses, response_mask = (
        part.view(prompts, answers, -1) for part in rows(prompts * answers, lengths.answer, False)
    )
    grid = responses.shape
    uniform = -torch.tensor(float(shape.vocab)).log()
    return DataProto.from_dict(
        {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "teacher_response": teacher,
            "teacher_attention_mask": torch.cat([attention_mask, teacher_mask], dim=-1),
            "responses": responses,
            "response_mask": response_mask,
            "old_log_probs": uniform + 0.1 * torch.randn(grid, generator=generator),
            "ref_log_prob": uniform + 0.1 * torch.randn(grid, generator=generator),
            "advantages": torch.randn((prompts, answers, 1), generator=generator).expand(grid).contiguous(),
        }
    )


def rows_of(loss: str, batch: DataProto) -> AnswerRows:
    """The rows that the update must forward: the teacher's, the student's, or for the discriminator both, each once."""
    if loss == "sft":
        return teacher_rows(batch)
    if loss.startswith("gspo"):
        return student_rows(batch)
    return AnswerRows.join([teacher_rows(batch), student_rows(batch)])


def repeated_prompts(rows: AnswerRows, batch: DataProto) -> list[int]:
    """Tokens of the prompts that `rows` repeat: each of the batch's prompts in all but one of the rows that have it."""
    return batch.batch["attention_mask"].sum(-1).repeat(len(rows) // len(batch) - 1).tolist()


def batch_of_tokens(shape: Shape, loss: str, answers: int, lengths: Lengths, tokens: int) -> DataProto:
    """The largest random batch whose update is on sequences of at most `tokens` together, each with its prompt."""
    rows_per_prompt = {"sft": 1, "gspo": answers, "gspo+anchor": answers}.get(loss, answers + 1)
    prompts = 2 * tokens // (rows_per_prompt * sum((*lengths.prompt, *lengths.answer)) // 2)
    batch = random_batch(shape, max(2, prompts), answers, lengths)
    for size in range(len(batch), 1, -1):
        if sum(rows_of(loss, batch[:size]).lengths()) <= tokens:
            return batch[:size]
    raise ValueError(f"{tokens} tokens do not hold two prompts with {rows_per_prompt} answers each: raise the number")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def base_overrides(folder: Path, device: str) -> list[str]:
    """Settings that all benchmarks share: where the models are, and the device with the type that suits it."""
    return [
        "trainer.experiment_name=benchmark",
        f"trainer.device={device}",
        f"actor_rollout_ref.model.path={folder / 'policy'}",
        f"critic.model.path={folder / 'critic'}",
        f"actor_rollout_ref.actor.fsdp_config.dtype={'bfloat16' if device == 'cuda' else 'float32'}",
        # Random models never end an answer, and what a step does must not depend on their scores.
        "algorithm.cut_answers=keep",
        "critic.balance.enable=False",
    ]


def fast_overrides(device: str) -> list[str]:
    """This trainer's way: packed rows up to a token budget, and on a GPU compiled layers."""
    return [f"{part}.use_torch_compile={device == 'cuda'}" for part in FSDP_PARTS]


def classic_overrides(tokens: int, width: int) -> list[str]:
    """The classic way: as many padded rows to a micro-batch as its budget of tokens holds, and nothing compiled."""
    rows = max(1, tokens // width)
    return [
        "actor_rollout_ref.model.use_remove_padding=False",
        "critic.model.use_remove_padding=False",
        "actor_rollout_ref.actor.use_dynamic_bsz=False",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={rows}",
        # Pairs of one student and one teacher.
        f"critic.ppo_micro_batch_size_per_gpu={max(2, rows)}",
        *(f"{part}.use_torch_compile=False" for part in FSDP_PARTS),
    ]


FSDP_PARTS = tuple(
    f"{part}.fsdp_config" for part in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic.model")
)


def compose(overrides: list[str]) -> Config:
    """The configuration, as the command line would make it."""
    return compose_config(overrides)
