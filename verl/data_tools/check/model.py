"""What a model's tokenizer and chat template make of rows, told from the tokens that training gives it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from verl.data_tools.check.findings import Finding, Sample, Samples
from verl.data_tools.check.rows import progress
from verl.utils.dataset.faults import TemplateCheck
from verl.utils.dataset.texts import Messages, Tokenization, special_names, without_eos_text

_ROWS_AT_ONCE = 64


def template_check(tokenization: Tokenization) -> TemplateCheck:
    """Training's own look at a chat template."""
    return TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)


class Tokens:
    """The samples as the model reads them; `lengths` are those of prompt and answer, None where there is no sample."""

    def __init__(self, tokenization: Tokenization):
        self.tokenization = tokenization
        self.lengths: list[tuple[int, int] | None] = []

    def findings(self, samples: Samples) -> Iterator[Finding]:
        """What the model reads otherwise than it stands, and names of special tokens in texts."""
        self.lengths = [None] * len(samples)
        there = [(number, sample) for number, sample in enumerate(samples) if sample is not None]
        bar = iter(progress(there, "tokenising"))
        while part := list(itertools.islice(bar, _ROWS_AT_ONCE)):
            prompts = self.tokenization.prompts([sample.messages for _, sample in part])
            answers = self.tokenization.answers([sample.answer for _, sample in part])
            for (number, sample), prompt, answer in zip(part, prompts, answers, strict=True):
                self.lengths[number] = len(prompt), len(answer)
                yield from self._of_row(number, sample, prompt, answer)

    def _of_row(self, number: int, sample: Sample, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Finding]:
        if len(answer) == 1:
            yield Finding("bad", number, "the tokenizer makes no token of the answer", sample.answer)
            return
        tokenizer = self.tokenization.tokenizer
        lost = lost_of_prompt(sample.messages, _decoded(tokenizer, prompt))
        if lost:
            yield Finding("template", number, *lost)
        text = without_eos_text(sample.answer, self.tokenization.ends or tokenizer.eos_token)
        read = _decoded(tokenizer, answer[:-1])
        if read != text:
            yield Finding("template", number, _difference("the answer", text, read), text)
        texts = [*(message["content"] for message in sample.messages), text]
        names = {name for one in texts for name in special_names(tokenizer, one)}
        if names:
            yield Finding("special_text", number, ", ".join(sorted(names)), next(t for t in texts if min(names) in t))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def lost_of_prompt(messages: Messages, prompt: str) -> tuple[str, str] | None:
    """What of the messages is not in the prompt as it stands, or not in order, with the text; or None."""
    position = 0
    for message in messages:
        text = message["content"]
        start = prompt.find(text, position)
        if start >= 0:
            position = start + len(text)
        elif text in prompt:
            return "the messages are in another order", text
        else:
            return _difference(f"a message of the {message['role']!r} role", text, prompt), text
    return None


def _difference(name: str, text: str, read: str) -> str:
    """In what a text and what is read, or what it is read within, are not the same."""
    if text.strip() in read:
        return f"{name} loses white space at its ends"
    if "".join(text.split()) in "".join(read.split()):
        return f"{name} has other white space"
    if text.casefold() in read.casefold():
        return f"{name} has other capital letters"
    return f"{name} has other characters"
