"""Texts as ids: special tokens stand where the template puts them and where an answer ends, and nowhere else."""

import logging

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config, make_row, make_tokenizer, write_jsonl
from verl.trainer.config import compose_config
from verl.trainer.main_ppo import create_rl_dataset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.texts import eos_texts, tokenize_answers, tokenize_prompts, without_eos_text

# Ids of the byte tokenizer: <pad> <eos> <user> <bot>, and bytes from 4 on.
PAD, EOS, USER, BOT = range(4)


def bytes_of(text: str) -> list[int]:
    """One id a byte, whatever the text names."""
    backend = byte_tokenizer().backend_tokenizer
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return [backend.token_to_id(letter) for piece, _ in pieces for letter in piece]


def test_names_of_special_tokens_in_an_answer_are_text():
    tokenizer = byte_tokenizer()
    answers = ["a<eos>b<user>c", "plain", "x<eos>", "<eos>x", "<pad><bot>"]
    expected = ["a<eos>b<user>c", "plain", "x", "<eos>x", "<pad><bot>"]
    assert tokenize_answers(tokenizer, answers) == [[*bytes_of(text), EOS] for text in expected]
    assert tokenize_answers(tokenizer, ["a<eos>b"], special_text="token") == [
        [*bytes_of("a"), EOS, *bytes_of("b"), EOS]
    ]
    # What was asked for once is not remembered.
    assert tokenizer("<eos>")["input_ids"] == [EOS]


def test_names_of_special_tokens_in_a_prompt_are_text():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "hi<bot>yes<eos><user>你好"}, {"role": "bot", "content": "<bot>"}]
    plain = [{"role": "user", "content": "q"}]
    assert tokenize_prompts(tokenizer, {}, [plain, messages, plain]) == [
        [USER, *bytes_of("q"), BOT],
        [USER, *bytes_of("hi<bot>yes<eos><user>你好"), BOT, *bytes_of("<bot>"), BOT],
        [USER, *bytes_of("q"), BOT],
    ]
    (tokens,) = tokenize_prompts(tokenizer, {}, [[{"role": "user", "content": "a<eos>"}]], special_text="token")
    assert tokens == [USER, *bytes_of("a"), EOS, BOT]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, whose special tokens strip the space beside them or begin like one another."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["user end of the turn <|im_end|> and the system <|im_start|> says the end"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False))
    specials = [AddedToken("<|im_end|>", special=True, rstrip=True), AddedToken("<|im_end|>>", special=True)]
    core.add_special_tokens(
        [*specials, AddedToken("<|im_start|>", special=True), AddedToken("<|endoftext|>", special=True)]
    )
    core.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    message = "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    tokenizer.chat_template = f"{{% for m in messages %}}{message}{{% endfor %}}<|im_start|>bot"
    return tokenizer


@pytest.mark.parametrize(
    "content",
    [
        "the end",
        "end <|im_end|>\n<|im_start|>system\nthe turn",
        "<|im_end|>>",
        " <|im_end|>",
        "x<think>y<|im_end|><think>",
    ],
)
def test_a_prompt_is_the_templates_tokens_and_the_texts_between_them(content):
    """Each stretch between two of the template's tokens, read alone and without special tokens."""
    tokenizer = merging_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def text(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    # <|im_end|> takes the line break behind it with it.
    expected = [start, *text(f"user\n{content.strip()}"), end, start, *text("bot")]
    (ids,) = tokenize_prompts(tokenizer, {}, [[{"role": "user", "content": content}]])
    assert ids == expected and ids.count(end) == 1 and ids.count(start) == 2
    assert (tokenizer.convert_tokens_to_ids("<think>") in ids) == ("<think>" in content), (
        "no special token, so it stays"
    )


def test_the_ends_of_an_answer_as_text():
    tokenizer = byte_tokenizer()
    word = bytes_of("a")[0]
    assert eos_texts(tokenizer) == ("<eos>",)
    # One that is an ordinary token is a word: "a" at the end of a text is no end.
    assert eos_texts(tokenizer, (EOS, BOT, word)) == ("<eos>", "<bot>")
    for text in ("yes<bot>", "yes <bot>\n", "yes<eos><bot> <eos>", "yes"):
        assert without_eos_text(text, ("<eos>", "<bot>")) == "yes"
        assert tokenize_answers(tokenizer, [text], ("<eos>", "<bot>")) == [[*bytes_of("yes"), EOS]]
    assert without_eos_text("yes <bot>", "<eos>") == "yes <bot>" and without_eos_text("yes \n", "<eos>") == "yes \n"
    assert without_eos_text("yes" + "<eos>" * 5000, "<eos>") == "yes"


@pytest.mark.parametrize(("mode", "says"), [("text", "are read as text"), ("token", "are read as the tokens")])
def test_rows_with_names_of_special_tokens_are_counted(tmp_path, caplog, mode, says):
    rows = [make_row(), make_row("a <bot> b", "x"), make_row("q", "a<eos>b"), make_row("q", "closed<bot> ")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = make_config(max_prompt_length=40, max_response_length=40)
    with caplog.at_level(logging.WARNING):
        dataset = RLHFDataset(path, byte_tokenizer(), config, eos_token_ids=(EOS, BOT), special_token_text=mode)
    (message,) = [record.message for record in caplog.records if "names of special tokens" in record.message]
    # The last row's is its end, which is taken off.
    assert message.startswith(
        f"2 of 4 rows have the names of special tokens in their texts, the first being {path}, row 1;"
    )
    assert says in message and "cannot" not in message
    assert (EOS in dataset[2]["teacher_response"].tolist()[:3]) == (mode == "token")
    assert (dataset[1]["raw_prompt_ids"].count(BOT) == 2) == (mode == "token")
    assert dataset[3]["teacher_response"].tolist()[:7] == [*bytes_of("closed"), EOS]


def test_a_tokenizer_whose_words_are_its_special_tokens_says_so(tmp_path, caplog):
    path = write_jsonl(tmp_path / "data.jsonl", [make_row("one <eos> two", "one")])
    with caplog.at_level(logging.WARNING):
        RLHFDataset(path, make_tokenizer(), make_config())
    assert any("which this tokenizer cannot do in 1 of them" in record.message for record in caplog.records)


@pytest.mark.parametrize("mode", ["text", "token"])
def test_a_runs_settings_reach_its_data(tmp_path, mode):
    path = write_jsonl(tmp_path / "data.jsonl", [make_row("q", "a<eos>b<bot>")])
    overrides = [f"data.train_files={path}", "actor_rollout_ref.model.path=/none", "trainer.experiment_name=x"]
    config = compose_config([*overrides, f"data.special_token_text={mode}"])
    dataset = create_rl_dataset(str(path), config.data, byte_tokenizer(), eos_token_ids=(EOS, BOT))
    answer = bytes_of("a<eos>b") if mode == "text" else [*bytes_of("a"), EOS, *bytes_of("b")]
    assert dataset[0]["teacher_response"].tolist()[: len(answer) + 1] == [*answer, EOS]
    assert dataset[0]["teacher_text"] == "a<eos>b"
