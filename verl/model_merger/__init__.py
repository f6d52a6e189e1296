"""Checkpoint folder in, Hugging Face folder out."""

__all__ = ["compare", "merge"]


def __getattr__(name: str) -> object:
    """`merge` and `compare`, when somebody asks for them: they bring torch along, which help does without."""
    if name in __all__:
        from verl.model_merger import merger

        return getattr(merger, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
