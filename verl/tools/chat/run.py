"""The conversation: lines in, answers out as they are drawn."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from verl.models.finding import check_files, refuse_discriminator
from verl.models.loading import load_model, quiet_transformers
from verl.models.tokenizer import all_eos_token_ids, find_tokenizer, load_tokenizer
from verl.tools.command import check_device
from verl.utils.checkpoint.whole import refuse_pointers
from verl.utils.console import printable
from verl.utils.dataset.faults import TemplateCheck, fault_of_text
from verl.utils.dataset.texts import Messages, Tokenization
from verl.utils.dataset.tokenizer_checks import check_tokenizer

RESET, HELP, QUIT = "/reset", "/help", ("/quit", "/exit")
COMMANDS = f"{RESET} begins a new conversation, {QUIT[0]} or {QUIT[1]} ends, {HELP} lists these"
# What looks like a command; a path, /etc/hosts, does not.
COMMAND = re.compile(r"/[A-Za-z_]+")
PROMPT = "> "
UNANSWERED, INTERRUPTED = 1, 130


class Chat:
    """A conversation with a model.

    Args:
        ends: token ids that end an answer.
        temperature: 0 is greedy.
        max_tokens: of an answer, its end included.
        system: the system message; None leaves it to the chat template.

    Raises:
        ValueError: the chat template has no place for a system message.
    """

    def __init__(
        self, model: PreTrainedModel, tokenization: Tokenization, ends: tuple[int, ...], temperature: float,
        max_tokens: int, system: str | None = None,
    ):  # fmt: skip
        self.model, self.tokenization, self.ends = model, tokenization, ends
        self.max_tokens = max_tokens
        # Of the model's own settings, nothing is to fill in what is not named here.
        model.generation_config = GenerationConfig(
            eos_token_id=list(ends), pad_token_id=tokenization.tokenizer.pad_token_id, do_sample=False
        )
        self._draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self._template = TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)
        self._first: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        self._refuse([*self._first, {"role": "user", "content": "Hello"}])

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: Messages = list(self._first)

    def answer(self, text: str, interruptible: bool) -> bool:
        """Answer a message on standard output, and remember both; returns whether the answer came to its end.

        Args:
            interruptible: Ctrl-C ends the answer alone.

        Raises:
            ValueError: why there is no answer; the message is then forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        self._refuse(messages)
        prompt = self.tokenization.prompts([messages])[0]
        room = self._room(len(prompt))
        streamer = _Shown(self.tokenization.tokenizer)
        ended = False
        try:
            ended = self._generate(prompt, room, streamer)[-1] in self.ends
        except KeyboardInterrupt:
            if not interruptible:
                raise
        finally:
            print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": streamer.text}]
        return ended

    def _refuse(self, messages: Messages) -> None:
        fault = fault_of_text(messages[-1]["content"], "the message") or self._template.fault(messages)
        if fault:
            raise ValueError(fault)

    def _room(self, prompt: int) -> int:
        """Tokens that an answer may have behind a prompt of so many."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and prompt >= context:
            raise ValueError(
                f"the conversation has {prompt} tokens and the model reads {context}: begin another with {RESET}"
            )
        return self.max_tokens if context is None else min(self.max_tokens, context - prompt)

    def _generate(self, prompt: list[int], room: int, streamer: TextStreamer) -> list[int]:
        """Token ids of the answer, its end included."""
        ids = torch.tensor([prompt], device=self.model.device)
        try:
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, streamer=streamer, **self._draw
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise ValueError("the model's next token has no finite probabilities: its weights diverged") from None
        return output[0, len(prompt) :].tolist()


class _Shown(TextStreamer):
    """Prints an answer as it is drawn, and keeps its text."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(printable(text), end="", flush=True)


def open_chat(options: argparse.Namespace) -> Chat:
    """The model of a folder that has been seen to be whole.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    folder = options.model
    refuse_discriminator(folder)
    check_files(folder)
    refuse_pointers(find_tokenizer(folder))
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    check_tokenizer(tokenizer, options.apply_chat_template_kwargs)
    model = load_model(folder, "policy", trust_remote_code=options.trust_remote_code, dtype=getattr(torch, dtype))
    return Chat(
        model.to(device),
        Tokenization(tokenizer, options.apply_chat_template_kwargs),
        all_eos_token_ids(tokenizer, folder),
        options.temperature,
        options.max_tokens,
        options.system,
    )


def run(options: argparse.Namespace) -> int:
    """Talk until there is nothing more to read; returns the exit code.

    Raises:
        OSError, ValueError: the model cannot be opened, as a sentence.
    """
    interactive = sys.stdin.isatty()
    quiet_transformers()
    if interactive:
        _note(f"opening {options.model} ...")
    chat = open_chat(options)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    code = 0
    try:
        for text in _typed() if interactive else _piped():
            if text in QUIT:
                break
            if text == RESET:
                chat.reset()
                _note("a new conversation")
            elif text == HELP:
                _note(COMMANDS)
            elif COMMAND.fullmatch(text):
                _note(f"there is no command {text}: {COMMANDS}")
                code = code if interactive else UNANSWERED
            elif not _answered(chat, text, interactive) and not interactive:
                code = UNANSWERED
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(flush=True)
        return INTERRUPTED
    return code


def _answered(chat: Chat, text: str, interactive: bool) -> bool:
    try:
        if not chat.answer(text, interactive):
            _note("(cut)")
    except ValueError as error:
        _note(f"no answer: {error}")
        return False
    return True


def _typed() -> Iterator[str]:
    """What is typed, line by line, with the editing keys that there are."""
    with suppress(ImportError):
        import readline  # noqa: F401
    _note(COMMANDS)
    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            print(flush=True)
            return
        if text:
            yield text


def _piped() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        text = line.strip("\ufeff \t\r\n")
        if text:
            yield text


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
