"""`verl chat` in processes of its own: answers that are known beforehand, several turns, a terminal and its Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.chain import write_chain
from tests.tiny import byte_tokenizer, causal_lm, write_model
from verl.tools.chat.command import main
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.console import printable

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "verl.cli", "chat"]


@pytest.fixture
def chat(monkeypatch, capsys):
    """The command in this process, with these lines on standard input: exit code, answers, notes."""

    def run(folder: Path, lines: str | bytes, *flags: str) -> tuple[int, str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = main([str(folder), *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Path:
    return write_chain(tmp_path_factory.mktemp("chinese"), "红花")


def test_lines_through_a_pipe_are_answered_until_quit(chinese):
    """In a terminal of ASCII alone, which gets question marks."""
    lines = "\ufeff你好\r\n\n  \n/reset\n".encode() + b"and \xff in English?\n/quit\nnever read\n"
    for encoding, said in (("utf-8", "红花"), ("ascii:strict", "??")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([*COMMAND, str(chinese)], cwd=ROOT, input=lines, capture_output=True, env=environment)
        assert (done.returncode, done.stdout.decode()) == (0, f"{said}\n{said}\n"), done.stderr.decode()
        assert done.stderr.decode() == "a new conversation\n"


def test_each_turn_is_answered_with_all_turns_before_it(chat, tmp_path):
    """A checkpoint's actor folder, greedy, against transformers' own generation of the whole conversation."""
    model = causal_lm(seed=3)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32)
    actor = tmp_path / "global_step_3" / "actor"
    manager.save_checkpoint(actor)

    turns, tokenizer = ["one", "二", "three"], byte_tokenizer()
    plain, messages, expected = model.eval(), [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = torch.tensor([prompt])
        drawn = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        text = tokenizer.decode(drawn[0, len(prompt) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        expected.append(printable(text))
    code, said, noted = chat(actor, "\n".join(turns), "--temperature", "0", "--max_tokens", "12")
    assert code == 0 and said == "\n".join(expected) + "\n", noted


def test_what_is_drawn_follows_the_seed(chat, tmp_path):
    folder = write_model(tmp_path / "model")
    # What the folder itself says of drawing does not count.
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "eos_token_id": 1}')
    said = [chat(folder, "a\nb\n", "--max_tokens", "20", "--temperature", "5", "--seed", seed)[1] for seed in "112"]
    assert said[0] == said[1] != said[2]


def test_a_conversation_that_is_full_is_said_and_can_begin_again(chat, tmp_path):
    folder = write_chain(tmp_path / "short", "abc", context=24)
    lines = "one\n" + "x" * 30 + "\n/reset\ntwo\n"
    code, said, noted = chat(folder, lines)
    assert (code, said) == (1, "abc\nabc\n")
    # <user>, "one", <bot>, "abc", <user>, 30 letters, <bot>: 40 tokens.
    assert "no answer: the conversation has 40 tokens and the model reads 24: begin another with /reset" in noted


def test_answers_that_are_cut_are_marked(chat, tmp_path):
    folder = write_chain(tmp_path / "endless", "ab", endless=True)
    assert chat(folder, "go\n", "--max_tokens", "5") == (0, "ababa\n", "(cut)\n")


def test_commands_are_listed_and_none_that_there_is_not_reaches_the_model(chat, chinese):
    listed = "/reset begins a new conversation, /quit or /exit ends, /help lists these"
    assert chat(chinese, "/help\n你好\n") == (0, "红花\n", f"{listed}\n")
    assert chat(chinese, "/bye\n") == (1, "", f"there is no command /bye: {listed}\n")
    # Neither is one: a path, and a sentence.
    assert chat(chinese, "/etc/hosts\n/help me\n") == (0, "红花\n红花\n", "")


@pytest.mark.parametrize("what", ["missing", "critic", "step"])
def test_a_folder_without_a_student_is_refused_with_a_sentence(chat, what, tmp_path):
    folder = tmp_path / what
    expected = "does not exist"
    if what == "critic":
        write_model(folder)
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("ForCausalLM", "ForTokenClassification"))
        expected = "holds a discriminator"
    if what == "step":
        (folder / "actor").mkdir(parents=True)
        expected = f"did you mean {folder / 'actor'}?"
    code, said, noted = chat(folder, "hello\n")
    assert (code, said) == (2, "") and noted.startswith("error: ") and expected in noted
    assert len(noted.splitlines()) == 1


def test_a_template_without_a_place_for_the_system_message_is_refused(chat, chinese, tmp_path):
    folder = write_model(tmp_path / "model")
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    code, _, noted = chat(folder, "hello\n", "--system", "Be brief.")
    assert code == 2 and "leaves out messages of the role 'system'" in noted
    assert chat(chinese, "hello\n", "--system", "Be brief.")[:2] == (0, "红花\n")


def test_in_a_terminal_ctrl_c_ends_an_answer_and_then_the_conversation(tmp_path):
    folder = write_chain(tmp_path / "endless", "ab", context=10**6, endless=True)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(folder), "--max_tokens", "900000"], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        _talk_and_interrupt(process, Screen(master))
    finally:
        # It would write for hours.
        process.kill()
        os.close(master)


def _talk_and_interrupt(process: subprocess.Popen, screen: Screen) -> None:
    screen.wait_for("> ")
    screen.type("go\n")
    screen.wait_for("abababab")
    process.send_signal(signal.SIGINT)
    screen.wait_for("(cut)")
    screen.wait_for("> ")
    screen.type("/reset\n")
    screen.wait_for("a new conversation")
    screen.wait_for("> ")
    # readline shows its prompt a moment before it waits: a signal between the two is only seen with the next key.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    screen.drain()
    assert "Traceback" not in screen.shown


class Screen:
    """The other end of a terminal."""

    def __init__(self, master: int):
        self.master, self.shown, self._seen = master, "", 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until the text comes, after what was waited for before."""
        end = time.monotonic() + seconds
        while self.shown.find(text, self._seen) < 0:
            assert time.monotonic() < end, self.shown[-2000:]
            self.shown += os.read(self.master, 4096).decode(errors="replace")
        self._seen = self.shown.find(text, self._seen) + len(text)

    def drain(self) -> None:
        """Read what is still there when the process has ended."""
        while True:
            try:
                piece = os.read(self.master, 4096)
            except OSError:
                return
            if not piece:
                return
            self.shown += piece.decode(errors="replace")


def test_it_opens_what_transformers_opens(chinese):
    """The made-up model is one that anybody reads: its answer is not this code's doing."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chinese), byte_tokenizer()
    ids = torch.tensor([tokenizer("hi<bot>", add_special_tokens=False)["input_ids"]])
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(drawn[0, ids.shape[1] :]) == "红花<eos>"
