"""Why something cannot be started, in one voice: `error: ...`, a line for each reason, without a traceback.

A reason is an error that this package raised on purpose, or the system's about a file. Anything else is a fault in the
code, and shows where it is. With VERL_TRACEBACK=1 everything does.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.utils.console import printable

PACKAGE = Path(__file__).parents[1]
# The exit code of wrong usage, and of input that cannot be used.
USAGE = 2
REASONS = (ValueError, OSError, ImportError, RuntimeError)


class Refused(ValueError):
    """Several reasons at once, one sentence each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class Findings:
    """Reasons that are gathered, so that all are told and not the first alone."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def __bool__(self) -> bool:
        return bool(self.errors)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep the reason that the block ends with, if it does; a fault goes on."""
        try:
            yield
        except REASONS as error:
            if not is_reason(error):
                raise
            self.errors.append(error)

    def tell(self) -> None:
        """Raise what was gathered: a single error as it is, several as Refused."""
        sentences = [sentence for error in self.errors for sentence in sentences_of(error)]
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise Refused(list(dict.fromkeys(sentences))) from self.errors[0]


def sentences_of(error: Exception) -> list[str]:
    """What an error says, a sentence for each of its problems."""
    if problems := getattr(error, "problems", None):
        return list(problems)
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return [str(error)]


def is_reason(error: BaseException) -> bool:
    """Whether a `raise` of this package raised it, or the system for a file.

    The innermost line of the traceback says so: it begins with `raise`. What a line only ran into (`int("x")`, an
    operation of torch) is a fault, and so is everything where the source is not there to be read.
    """
    if not isinstance(error, REASONS):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    innermost = traceback.extract_tb(error.__traceback__, limit=-1)
    if not innermost:
        return False
    raised = (innermost[0].line or "").startswith("raise ")
    return raised and Path(innermost[0].filename).is_relative_to(PACKAGE)


@contextmanager
def before_the_start() -> Iterator[None]:
    """Mark the reason that the block ends with: who called may tell it without a traceback (`is_told_plainly`)."""
    try:
        yield
    except REASONS as error:
        if is_reason(error):
            error.before_the_start = True
        raise


def is_told_plainly(error: BaseException) -> bool:
    """Whether its sentences are all that a user needs of it."""
    return getattr(error, "before_the_start", False) and not wants_traceback()


def wants_traceback() -> bool:
    """Whether tracebacks are asked for, with VERL_TRACEBACK=1."""
    return os.environ.get("VERL_TRACEBACK", "") not in ("", "0")


def text_of(error: Exception) -> str:
    """What an error says, printable: a line `error: ...` for each problem, or its traceback where that is asked for."""
    if wants_traceback():
        return printable("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip("\n"))
    return printable("\n".join(f"error: {sentence}" for sentence in sentences_of(error)))


class Ended(SystemExit):
    """Ends a command that tells why on standard error, with the exit code of wrong usage; the reason is its text."""

    def __init__(self, error: Exception):
        tell(error)
        super().__init__(text_of(error))
        self.code = USAGE


def tell(error: Exception) -> None:
    """Print `text_of` it to standard error."""
    print(text_of(error), file=sys.stderr)
