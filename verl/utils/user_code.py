"""Functions that users bring along: `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from verl.utils.signals import Interruption


class _Left(BaseException):
    """`os._exit` was called where it must not end the process."""


def is_user_function(name: str) -> bool:
    """Whether `name` points into a file, rather than naming something registered."""
    return ".py:" in name


def with_absolute_path(name: str) -> str:
    """`file.py:function` with the file's absolute path; workers may run in another folder than the driver."""
    path, _, function = name.rpartition(":")
    return f"{Path(path).expanduser().absolute()}:{function}"


@contextmanager
def cannot_end_the_run(what: str) -> Iterator[None]:
    """Within the block, which is `what`'s own code, the process does not end by Python's means.

    Neither by `exit()`, nor by any other exception that is not an Exception, nor by `os._exit`: with the code that it
    names, a run would be over without a word, as if it were done.

    Raises:
        RuntimeError: it tried to.
    """
    process, leave = os.getpid(), os._exit

    def refuse(code: int) -> NoReturn:
        if os.getpid() != process:
            # A child that it forked ends like this.
            leave(code)
        raise _Left(f"os._exit({code})")

    os._exit = refuse
    try:
        yield
    except (Exception, Interruption):
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, _Left) else f"{type(error).__name__}({error})"
        raise RuntimeError(f"{what} tried to end the process by {said}: let it raise an Exception instead") from error
    finally:
        os._exit = leave


def load_user_function(name: str) -> Callable:
    """The function that `path/to/file.py:function` names, to be called in `cannot_end_the_run`. A file is run once per
    process.

    Raises:
        ValueError: there is no such file, it fails when it is run, or it has no such function.
    """
    path, _, function = with_absolute_path(name).rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path}; give path/to/file.py:function")
    module_name = f"verl_user_code:{path}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        # Registered first, as imports are: dataclasses in the file look themselves up.
        sys.modules[module_name] = module
        try:
            with cannot_end_the_run(path):
                spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(f"{name}: running {path} failed with {type(error).__name__}: {error}") from error
    found = getattr(sys.modules[module_name], function, None)
    if not callable(found):
        raise ValueError(f"{name}: {path} has no function {function!r}")
    return found
