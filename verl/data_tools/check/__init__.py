"""Is this dataset sound? Looked at before money and hours go into training on it."""

from verl.data_tools.check.command import main, parse

__all__ = ["main", "parse"]
