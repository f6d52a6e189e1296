"""How long prompts and answers are in a model's tokens, and the settings that fit them."""

from verl.data_tools.lengths.command import main, parse

__all__ = ["main", "parse"]
