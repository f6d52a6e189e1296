"""Functions that users bring along: `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path


def is_user_function(name: str) -> bool:
    """Whether `name` points into a file, rather than naming something registered."""
    return ".py:" in name


def with_absolute_path(name: str) -> str:
    """`file.py:function` with the file's absolute path; workers may run in another folder than the driver."""
    path, _, function = name.rpartition(":")
    return f"{Path(path).expanduser().absolute()}:{function}"


def load_user_function(name: str) -> Callable:
    """The function that `path/to/file.py:function` names. A file is run once per process.

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
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(f"{name}: running {path} failed with {type(error).__name__}: {error}") from error
    found = getattr(sys.modules[module_name], function, None)
    if not callable(found):
        raise ValueError(f"{name}: {path} has no function {function!r}")
    return found
