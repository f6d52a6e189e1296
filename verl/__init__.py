"""Black-box distillation trainer: SeqKD, discriminator warmup, GAD."""

__all__ = ["DataProto", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`DataProto`, when somebody asks for it: it brings torch along, and importing `verl` alone does not."""
    if name == "DataProto":
        from verl.protocol import DataProto

        return DataProto
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
