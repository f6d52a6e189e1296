"""Classes by name, for those who have to say which before they load them: what needs torch takes seconds."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from importlib import import_module
from typing import Any


def loaded(named: Any) -> Any:
    """What "module:name" names; anything but a text is itself."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)


def call(name: str, *args: Any) -> Any:
    """Call the function that is named."""
    return loaded(name)(*args)


class LoadedWhenAsked:
    """An attribute of a class: what is named, or several by their keys, loaded when somebody asks for the attribute."""

    def __init__(self, names: str | Mapping[Hashable, str]):
        self.names = names

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if isinstance(self.names, str):
            return loaded(self.names)
        return {key: loaded(name) for key, name in self.names.items()}


def as_named(owner: object, attribute: str) -> Any:
    """The attribute, or, without loading it, the names of what it is."""
    found = inspect.getattr_static(owner, attribute)
    return found.names if isinstance(found, LoadedWhenAsked) else getattr(owner, attribute)
