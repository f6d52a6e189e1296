"""A discriminator with a tokenizer of its own: what it reads, and Hugging Face's own scores of that.

Expected ids come from the two tokenizers called directly; expected scores from transformers' sequence classification.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.other_tokenizer import END, TEMPLATE, other_tokenizer, write_other_model, write_reward_model
from tests.tiny import byte_tokenizer, write_model
from verl.batch import CRITIC_PROMPT_KEYS, GROUP_KEYS, Prompts, columns
from verl.protocol import DataProto
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import compose_config
from verl.trainer.main_ppo import create_rl_dataset
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.model_checks import check_models
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.utils.dataset.own_prompts import OwnLimits, OwnPrompts
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.dataset.texts import Tokenization
from verl.workers.fsdp_workers import CriticWorker

STUDENT, OTHER = byte_tokenizer(), other_tokenizer()
EOS, BOT, USER = 1, 3, 2
T = 24


def reader(response=40, special_text="text"):
    tokenization = Tokenization(OTHER, {}, None, special_text)
    return OwnTokens(STUDENT, (EOS, BOT), tokenization, OwnLimits(60, response, "error"))


def rows(*answers):
    """Lists of ids, right-padded with EOS, which is the pad of some tokenizers."""
    ids = torch.tensor([[*answer, *[EOS] * (T - len(answer))] for answer in answers])
    return ids, torch.tensor([[1] * len(answer) + [0] * (T - len(answer)) for answer in answers])


def read(own, *answers):
    made = own.answers(*rows(*answers))
    return [ids[mask.bool()].tolist() for ids, mask in zip(made.ids, made.mask, strict=True)], made.cut.tolist()


def byte_fallback_tokenizer():
    """As of Llama 2: what is no token of its own is written in bytes."""
    tokens = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def of_student(text):
    return STUDENT(text, add_special_tokens=False)["input_ids"]


def of_other(text):
    return OTHER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("text", ["It is 3.", "红的。", " two  spaces\n\n", "3 红 é 👍"])
def test_an_answer_is_its_text_with_the_discriminators_eos_where_it_ended(text):
    ids = of_student(text)
    assert of_other(text) and OTHER.decode(of_other(text)) == text
    got, cut = read(reader(), [*ids, EOS], [*ids, BOT], ids)
    # Whichever EOS the student closes with; none where it was cut.
    assert got == [[*of_other(text), OTHER.eos_token_id], [*of_other(text), OTHER.eos_token_id], of_other(text)]
    assert cut == [False, False, False]
    assert OTHER.eos_token_id not in of_other(text) and of_other(text) != ids


def test_half_a_character_at_the_cut_is_left_out_and_elsewhere_seen():
    red = of_student("红")
    assert len(red) == 3
    got, _ = read(reader(), [*red, *red[:2]], [*red[:2], *of_student("a"), EOS], [*red[:1], EOS])
    assert got[0] == of_other("红")
    assert got[1] == [*of_other("\ufffda"), OTHER.eos_token_id]
    assert got[2] == [*of_other("\ufffd"), OTHER.eos_token_id]


def test_half_a_character_of_a_tokenizer_that_falls_back_to_bytes():
    """Its decoder writes a sign for each byte."""
    own = OwnTokens(
        byte_fallback_tokenizer(), (EOS,), *(getattr(reader(), name) for name in ("tokenization", "limits"))
    )
    a, *red = own.student("a红", add_special_tokens=False)["input_ids"]
    assert len(red) == 3 and own.student.decode([a, *red[:2]]) == "a\ufffd\ufffd"
    got, _ = read(own, [a, *red[:2]], [a, *red])
    assert got == [of_other("a"), of_other("a红")]


def test_names_of_special_tokens_are_letters_on_the_way():
    """The student's own, which it wrote in the midst of an answer, and the discriminator's, whose EOS a text may name:
    neither is dropped, and neither ends the answer."""
    got, _ = read(reader(), [*of_student("a"), USER, *of_student("b"), EOS], of_student(f"x{END}"))
    assert got == [[*of_other("a<user>b"), OTHER.eos_token_id], of_other(f"x{END}")]
    assert OTHER.eos_token_id not in got[1]
    # Where names are to be tokens, a cut answer still has no EOS at its end.
    got, _ = read(reader(special_text="token"), of_student(f"x{END}"), [*of_student(f"x{END}"), EOS])
    assert got == [of_other("x"), [*of_other("x"), OTHER.eos_token_id]]


def test_an_answer_without_text_has_a_token_to_score():
    assert read(reader(), [EOS], [])[0] == [[OTHER.eos_token_id], [OTHER.eos_token_id]]


def test_what_does_not_fit_loses_its_end_and_is_counted():
    text = "it was 7 of 9"
    whole = of_other(text)
    for limit, fits in ((len(whole) + 1, True), (len(whole), False), (3, False)):
        got, cut = read(reader(limit), [*of_student(text), EOS])
        assert got == [[*whole, OTHER.eos_token_id][:limit]] and cut == [not fits]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, and whole groups


CONTENTS = [
    [{"role": "user", "content": "What is it?"}],
    [{"role": "user", "content": "天空是什么颜色?"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<s>?"}],
]
TEACHERS = ["It is 3.", "红的。", f"{END} no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    write_model(path / "student")
    write_reward_model(path / "rewards")
    write_other_model(path / "other")
    with (path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for content, teacher in zip(CONTENTS, TEACHERS, strict=True):
            file.write(json.dumps({"content": content, "teacher_response": teacher}, ensure_ascii=False) + "\n")
    yield path
    if dist.is_initialized():
        dist.destroy_process_group()


def settings(folder, critic="rewards", *overrides):
    return compose_config(
        [
            "stage=gad", f"data.train_files={folder}/rows.jsonl", f"actor_rollout_ref.model.path={folder}/student",
            f"critic.model.path={folder}/{critic}", "trainer.experiment_name=x", "data.max_prompt_length=40",
            f"data.max_response_length={T}", "data.train_batch_size=3", "actor_rollout_ref.rollout.n=2",
            "trainer.device=cpu", *overrides,
        ]
    )  # fmt: skip


def dataset(folder, config, own):
    return own.with_prompts(create_rl_dataset(str(folder / "rows.jsonl"), config.data, STUDENT))


def theirs(content):
    return OTHER.apply_chat_template(content, add_generation_prompt=True, tokenize=False)


def test_prompts_are_under_the_discriminators_template(folder):
    config = settings(folder)
    own = OwnTokens.of(config, STUDENT)
    assert (own.limits.prompt, own.limits.response) == (80, 2 * T)
    made = dataset(folder, config, own)
    for number in (0, 1):
        row = made[number]
        got = row["critic_input_ids"][row["critic_attention_mask"].bool()].tolist()
        assert got == OTHER(theirs(CONTENTS[number]), add_special_tokens=False)["input_ids"]
        assert row["critic_input_ids"].shape == (80,) and row["critic_attention_mask"][-1] == 1
        assert row["input_ids"].shape == (40,)
    # The name of a special token in a message is letters: one <s>, the template's.
    third = made[2]["critic_input_ids"][made[2]["critic_attention_mask"].bool()].tolist()
    assert third.count(OTHER.bos_token_id) == 1 and OTHER.decode(third) == theirs(CONTENTS[2])


def test_tools_reach_the_discriminators_template(folder, tmp_path):
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    row = {"content": CONTENTS[0], "teacher_response": "It is 3.", "tools": [tool]}
    (tmp_path / "tools.jsonl").write_text(json.dumps(row) + "\n")
    config = settings(folder, "rewards", "critic.max_prompt_length=200")
    rows = create_rl_dataset(str(tmp_path / "tools.jsonl"), config.data, STUDENT)
    made = OwnTokens.of(config, STUDENT).with_prompts(rows)[0]
    assert '"name": "find"' in OTHER.decode(made["critic_input_ids"][made["critic_attention_mask"].bool()])


def answered(folder, config, own):
    """A table of the rows with two answers each, ended and cut ones."""
    batch = DataProto.from_single_dict(collate_fn([dataset(folder, config, own)[n] for n in range(3)], Prompts.names()))
    texts = [["It is 4.", "红"], ["红的。", "红色的苹果"], ["one is one", ""]]
    ids, mask = rows(
        *([*of_student(t), *([EOS] if n == 0 or not t else [])] for pair in texts for n, t in enumerate(pair))
    )
    answers = {"responses": ids.view(3, 2, T), "response_mask": mask.view(3, 2, T)}
    return batch.union(DataProto.from_dict(answers)), texts


def test_scores_are_hugging_faces_of_the_same_text(folder):
    """A reward model of another family than the student: the whole way from the student's tokens to scores."""
    config = settings(folder, "rewards", "critic.discriminator.pooling=last_token")
    own = OwnTokens.of(config, STUDENT)
    worker = ClassWithInitArgs(CriticWorker, config.critic, total_steps=5, device="cpu", seed=1)
    group = LocalWorkerGroup(worker)
    group.init_model()
    data, texts = answered(folder, config, own)
    scores = Discriminator(config, group, own).scores(data).batch
    hf = AutoModelForSequenceClassification.from_pretrained(folder / "rewards").eval()

    def expected(prompt, text, ended):
        ids = OTHER(theirs(prompt), add_special_tokens=False)["input_ids"] + of_other(text)
        return hf(torch.tensor([[*ids, *([OTHER.eos_token_id] if ended else [])]])).logits.item()

    for row, prompt in enumerate(CONTENTS[:2]):
        assert scores["teacher_scores"][row, 0].item() == pytest.approx(expected(prompt, TEACHERS[row], True), abs=1e-5)
        for number, text in enumerate(texts[row]):
            wanted = expected(prompt, text, ended=number == 0)
            assert scores["student_scores"][row, number].item() == pytest.approx(wanted, abs=1e-5)
    # The student wrote what the teacher wrote, in other tokens or not: to the last bit.
    assert scores["student_scores"][1, 0] == scores["teacher_scores"][1, 0]


def test_groups_have_all_columns_and_what_was_cut_is_measured(folder):
    config = settings(folder, "rewards", "critic.max_response_length=3")
    own = OwnTokens.of(config, STUDENT)
    data, texts = answered(folder, config, own)
    groups, metrics = own.groups(data)
    assert set(groups.batch.keys()) == set(GROUP_KEYS)
    assert groups.batch["responses"].shape == (3, 2, 3) and groups.batch["teacher_attention_mask"].shape == (3, 83)
    lengths = [len(of_other(text)) + (n == 0 or not text) for pair in texts for n, text in enumerate(pair)]
    assert metrics["critic/own_tokens/student_cut_ratio"] == pytest.approx(np.mean([n > 3 for n in lengths]))
    teachers = [len(of_other(text)) + 1 for text in TEACHERS]
    assert metrics["critic/own_tokens/teacher_cut_ratio"] == pytest.approx(np.mean([n > 3 for n in teachers]))
    tokens = data.batch["response_mask"].sum().item()
    assert metrics["critic/own_tokens/per_token"] == pytest.approx(sum(min(3, n) for n in lengths) / tokens)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_table_without_the_discriminators_prompts(folder):
    config = settings(folder)
    own = OwnTokens.of(config, STUDENT)
    data, _ = answered(folder, config, own)
    with pytest.raises(ValueError, match=r"no critic_input_ids and no critic_attention_mask: expected a dataset"):
        own.groups(columns(data, GROUP_KEYS))
    assert set(CRITIC_PROMPT_KEYS) <= set(data.batch.keys())


def test_prompts_that_are_too_long_are_refused_or_cut_and_counted(folder, caplog):
    config = settings(folder, "rewards", "critic.max_prompt_length=18")
    own = OwnTokens.of(config, STUDENT)
    lengths = [len(OTHER(theirs(content), add_special_tokens=False)["input_ids"]) for content in CONTENTS[:2]]
    assert max(lengths) > 18
    with pytest.raises(
        ValueError, match=r"tokens of the discriminator's tokenizer, more than critic\.max_prompt_length"
    ):
        dataset(folder, config, own)
    config = settings(folder, "rewards", "critic.max_prompt_length=18", "data.truncation=left")
    with caplog.at_level(logging.WARNING):
        made = dataset(folder, config, OwnTokens.of(config, STUDENT))
    assert "prompts do not fit critic.max_prompt_length=18 in the discriminator's tokens and are cut" in caplog.text
    whole = OTHER(theirs(CONTENTS[0]), add_special_tokens=False)["input_ids"]
    assert made[0]["critic_input_ids"].tolist()[-5:] == whole[-5:]


def test_rows_that_the_discriminators_template_refuses_are_named(folder):
    strict = TEMPLATE.replace("{{ '<s>' }}", "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}")
    config = settings(folder)
    rows = create_rl_dataset(str(folder / "rows.jsonl"), config.data, STUDENT)
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be read by the discriminator(.|\n)*row 2.*one turn"):
        OwnPrompts(rows, Tokenization(other_tokenizer(strict)), OwnLimits(80, 48, "error"))


def test_models_are_looked_at_with_the_discriminators_lengths(folder, tmp_path):
    check_models(settings(folder))
    check_models(settings(folder, "other", "trainer.critic_warmup=1"))
    write_other_model(tmp_path / "short", max_position_embeddings=100)
    critic = f"critic.model.path={tmp_path}/short"
    with pytest.raises(
        ValueError, match=r"short: critic\.max_prompt_length.* = 128 is above max_position_embeddings=100"
    ):
        check_models(settings(folder, "rewards", "trainer.critic_warmup=1", critic))
    lengths = ("critic.max_prompt_length=60", "critic.max_response_length=40")
    check_models(settings(folder, "rewards", "trainer.critic_warmup=1", critic, *lengths))


def test_a_tokenizer_without_a_chat_template_is_refused(folder, tmp_path):
    write_other_model(tmp_path / "base", other_tokenizer(template=None))
    with pytest.raises(ValueError, match="has no chat template"):
        check_models(settings(folder, "rewards", f"critic.model.path={tmp_path}/base", "trainer.critic_warmup=1"))


def test_lengths_without_a_use_are_refused(folder):
    with pytest.raises(
        ValueError, match=r"critic\.max_response_length=9 is for a discriminator with a tokenizer of its"
    ):
        check_models(settings(folder, "student", "trainer.critic_warmup=1", "critic.max_response_length=9"))
    assert OwnTokens.of(settings(folder, "student", "trainer.critic_warmup=1"), check_models(settings(folder))) is None


def test_the_students_tokenizer_handed_on_is_warned_of(folder, caplog):
    alone = folder / "alone"
    byte_tokenizer().save_pretrained(alone)
    with caplog.at_level(logging.WARNING):
        check_models(settings(folder, "rewards", f"actor_rollout_ref.model.tokenizer_path={alone}"))
    assert f"set critic.model.tokenizer_path={folder}/rewards" in caplog.text


def test_the_students_tokens_without_an_embedding_are_refused(folder, tmp_path):
    """The student's tokenizer handed on to a discriminator of another family, whose embedding is smaller."""
    alone = folder / "alone"
    byte_tokenizer().save_pretrained(alone)
    write_other_model(tmp_path / "small", byte_tokenizer(), vocab_size=150)
    critic = (f"critic.model.path={tmp_path}/small", "trainer.critic_warmup=1")
    with pytest.raises(ValueError, match=r"small: .*of the student.*set critic\.model\.tokenizer_path="):
        check_models(settings(folder, "rewards", f"actor_rollout_ref.model.tokenizer_path={alone}", *critic))


def test_arguments_of_the_students_template_that_the_discriminators_does_not_know_are_said(folder, caplog):
    with caplog.at_level(logging.INFO):
        own = OwnTokens.of(settings(folder, "rewards", "+data.apply_chat_template_kwargs.thinking=false"), STUDENT)
    assert own.tokenization.template_kwargs == {}
    assert "does not know data.apply_chat_template_kwargs.thinking" in caplog.text


def test_another_pooling_than_a_reward_models_is_warned_of(folder, caplog):
    with caplog.at_level(logging.WARNING):
        check_models(settings(folder, "rewards", "critic.discriminator.pooling=last_token"))
        assert "was trained with" not in caplog.text
        check_models(settings(folder, "rewards", "critic.discriminator.pooling=mean"))
    assert "was trained with critic.discriminator.pooling=last_token, and this run uses pooling=mean" in caplog.text
