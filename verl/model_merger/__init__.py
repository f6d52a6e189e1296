"""Checkpoint folder in, Hugging Face folder out."""

from verl.model_merger.merger import compare, merge

__all__ = ["compare", "merge"]
