"""The teacher's answers to prompts, through an OpenAI-compatible endpoint."""

from verl.data_tools.collect.command import main, parse

__all__ = ["main", "parse"]
