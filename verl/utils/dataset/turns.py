"""Whole conversations as rows to train on: one for each assistant turn, with the messages before it as its prompt.

A row is a pair of numbers, the file's row and the turn; its texts are taken from the file when it is asked for. A turn
that cannot be used is a row all the same (`NoTurn`), so that it is counted and named like any bad row.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from verl.utils.dataset.arrow_rows import FileRows, NoTurn, Place, Record
from verl.utils.dataset.cache import HEAD, Cache
from verl.utils.dataset.faults import ANSWERING_ROLES, fault_of_answer, fault_of_columns, fault_of_messages
from verl.utils.stalls import doing

logger = logging.getLogger(__name__)

# Which assistant turns of a conversation are rows to train on; none: a row is a prompt and its answer.
Turns = Literal["none", "all", "last"]

# Roles whose messages ask for nothing.
_NOT_ASKING = ANSWERING_ROLES | {"system", "developer"}
# What a message has besides a text where it calls tools, and where it says whether it is to be learnt from.
_CALLS, _LEARNT = ("tool_calls", "function_call"), ("weight", "train")


class TurnRows:
    """The assistant turns of a file of conversations, with the interface of `FileRows`.

    Every row of the file has one entry at least. Turns count a conversation's assistant messages from 0; an answer in a
    column of its own is the one behind them.

    Args:
        file: the conversations.
        turns: all, or the last one of each conversation.
        prompt_key, response_key: the columns of chat messages and of an answer to the last of them.
        cache: where the turns of a mapped file are kept.
    """

    def __init__(self, file: FileRows, turns: Literal["all", "last"], prompt_key: str, response_key: str, cache: Cache):
        self.file = file
        self.path = file.path
        self.digest = f"{file.digest}-{turns}"
        self._turns, self._prompt_key, self._response_key = turns, prompt_key, response_key
        # (entries, 2), int64: the row of the file, and the turn, or -1 where there is none.
        self._entries, only_history = self._find(cache)
        logger.info(
            "data.turns=%s: %d rows to train on from %d conversations of %s%s",
            turns, len(self), len(file), self.path,
            f"; {only_history} assistant messages stay in the history without being learnt from, as they call tools "
            "without a text or are marked so (weight, train)" if only_history else "",
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._entries)

    def place(self, number: int) -> Place:
        """Where a row stands in the file."""
        row, turn = self._entries[number].tolist()
        return Place(row, turn if turn >= 0 else None)

    def record(self, number: int) -> Record:
        """One row, read anew each time."""
        return next(self.records(number, number + 1))

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The rows from `start` to before `stop`; each conversation is read once."""
        entries = self._entries[start:stop].tolist()
        if not entries:
            return
        row = entries[0][0]
        records = self.file.records(row, entries[-1][0] + 1)
        record = next(records)
        for wanted, turn in entries:
            if wanted != row:
                row, record = wanted, next(records)
            yield self._turn(record, turn) if isinstance(record, dict) else record

    # -- which turns there are

    def _find(self, cache: Cache) -> tuple[np.ndarray, int]:
        """The entries, and how many assistant messages are none of them; from the cache where the file is mapped."""
        if self.file.mapped is None:
            return self._look()
        seen: list[tuple[np.ndarray, int]] = []

        def write(part: Path) -> None:
            seen.append(self._look())
            with part.open("ab") as stream:
                for numbers in seen[0]:
                    np.save(stream, numbers)

        settings = [self.digest, self.path.suffix, self._prompt_key, self._response_key]
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        key = f"turns-{hashlib.sha256(json.dumps([code, *settings]).encode()).hexdigest()}"
        kept = cache.file(key, write, f"which turns the {len(self.file)} conversations of {self.path} have")
        if seen or kept is None:
            return seen[0] if seen else self._look()
        with kept.open("rb") as stream:
            stream.seek(HEAD)
            return np.load(stream), int(np.load(stream))

    def _look(self) -> tuple[np.ndarray, int]:
        entries, only_history = array("q"), 0
        with doing(f"finding the turns of {self.path}"):
            for row, record in enumerate(self.file.records(0, len(self.file))):
                turns, others = self._turns_of(record) if isinstance(record, dict) else ([], 0)
                for turn in turns or [-1]:
                    entries.extend((row, turn))
                only_history += others
        return np.array(entries, dtype=np.int64).reshape(-1, 2), only_history

    def _turns_of(self, record: dict[str, Any]) -> tuple[list[int], int]:
        """The turns of a conversation that are rows, and how many assistant messages are not to be."""
        messages = record.get(self._prompt_key)
        if not isinstance(messages, list) or not messages:
            return [], 0
        answers = [messages[place] for place in _answers(messages)]
        turns = [turn for turn, message in enumerate(answers) if not _only_history(message)]
        others = len(answers) - len(turns)
        answered = record.get(self._response_key) is not None
        if answered:
            turns.append(len(answers))
        if self._turns == "last":
            turns = turns[-1:]
        # What is asked last and not answered is said, also where there are answers before.
        ends_open = not answered and not _is_answer(messages[-1])
        return [*turns, *([len(answers)] if ends_open else [])], others

    # -- what they are

    def _turn(self, record: dict[str, Any], turn: int) -> Record:
        """A turn as a prompt and its answer, beside the row's other columns."""
        key, messages = self._prompt_key, record.get(self._prompt_key)
        if turn < 0:
            fault = fault_of_columns(record, [key])
            if fault is None and (not isinstance(messages, list) or not messages):
                fault = fault_of_messages(messages, key)
            return NoTurn(fault or "none of its assistant messages is to be learnt from: they call tools or are marked")
        places = _answers(messages)
        if turn == len(places):
            if record.get(self._response_key) is not None:
                return record
            return NoTurn("the conversation ends without an answer" if places else "there is no assistant message")
        before, answer = messages[: places[turn]], messages[places[turn]].get("content")
        if all(_role(message) in _NOT_ASKING for message in before):
            return NoTurn("the conversation begins with an answer that nobody asked for")
        fault = fault_of_answer(answer, key)
        return NoTurn(fault) if fault else record | {key: before, self._response_key: answer}


def _role(message: Any) -> str | None:
    """The role in small letters, if there is one."""
    role = message.get("role") if isinstance(message, dict) else None
    return role.lower() if isinstance(role, str) else None


def _is_answer(message: Any) -> bool:
    return _role(message) in ANSWERING_ROLES


def _answers(messages: list[Any]) -> list[int]:
    """The places of the assistant messages."""
    return [place for place, message in enumerate(messages) if _is_answer(message)]


def _only_history(message: dict[str, Any]) -> bool:
    """Whether an assistant message calls tools without a text, or is marked as not to be learnt from."""
    text = message.get("content")
    silent = text is None or (isinstance(text, str) and not text.strip())
    marked = any(message.get(key) is not None and not message[key] for key in _LEARNT)
    return marked or (silent and any(message.get(key) for key in _CALLS))
