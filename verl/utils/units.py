"""Units in which sizes are shown, and numbers of things."""

GIB = 2**30


def counted(number: int, thing: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
