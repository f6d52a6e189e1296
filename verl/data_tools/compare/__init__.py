"""How two sets of prompts and answers differ, and whether it is more than chance."""

from verl.data_tools.compare.command import main, parse

__all__ = ["main", "parse"]
